"""Flux: full size on meta tensors, tokens, levels, the official pipeline's inputs. Acceptance 20, 25–28, 34, 35."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from flux_world import KONTEXT, NANO, paired_world
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_world import TinyWorld
from torch import Tensor

from simpletuner.config.flux_options import FluxOptions
from simpletuner.config.lycoris import make_lycoris_config
from simpletuner.config.model_options import AdapterOptions
from simpletuner.config.training_options import LossOptions
from simpletuner.data.loader import Batch
from simpletuner.data.plan import START
from simpletuner.diffusion.flow import FlowObjective, sampler_mu
from simpletuner.families.base import build_family
from simpletuner.families.flux.packing import pack, reference_offsets, unpack
from simpletuner.families.flux.spec import LORA_TARGETS, SPEC
from simpletuner.families.quantize import quantised_names
from simpletuner.families.registry import load_spec
from simpletuner.train.adapters import Lycoris, match_modules

COUNTS = {
    "all": (266, 26_148_864),
    "mmdit": (266, 26_148_864),
    "context": (76, 7_471_104),
    "context+ffs": (114, 16_809_984),
    "all+ffs": (418, 65_372_160),
    "ai-toolkit": (494, 85_917_696),
}


@pytest.fixture(scope="module")
def full_size() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return paired_world(tmp_path_factory.mktemp("flux"))


def test_full_size(full_size: FluxTransformer2DModel) -> None:
    """Acceptance 28."""
    assert sum(parameter.numel() for parameter in full_size.parameters()) == 11_901_408_320
    linear = {n: m for n, m in full_size.named_modules() if isinstance(m, torch.nn.Linear)}
    quantised = [linear[name] for name in quantised_names(full_size, "int8-quanto", SPEC.unquantised)]
    assert len(quantised) == 494 and len(linear) - len(quantised) == 10
    assert round(sum(m.weight.numel() for m in quantised) / 1e9, 3) == 11.834


@pytest.mark.parametrize("preset", COUNTS)
def test_lora_targets(full_size: FluxTransformer2DModel, preset: str) -> None:
    names = match_modules(full_size, LORA_TARGETS[preset])
    modules = [full_size.get_submodule(name) for name in names]
    assert (len(names), sum(16 * (m.in_features + m.out_features) for m in modules)) == COUNTS[preset]
    assert "proj_out" not in names


def test_lycoris_on_full_size(full_size: FluxTransformer2DModel, world: TinyWorld) -> None:
    """Acceptance 34, 35: the same 266 modules, dropout active, and a second run is not affected."""
    from lycoris.wrapper import LycorisNetwork

    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    options = KONTEXT | {"lora_type": "lycoris", "lora_rank": 16, "lora_dropout": 0.05}
    config = world.resolve(**options).require()
    made = make_lycoris_config(AdapterOptions(lora_rank=16, lora_dropout=0.05))
    assert isinstance(config.adapter.lycoris_config, dict)
    assert config.adapter.lycoris_config.items() >= made.items()
    adapter = Lycoris(full_size, config, SPEC)
    names = {name for name, _ in adapter._modules}
    assert names == set(match_modules(full_size, LORA_TARGETS["all"])) and len(names) == 266
    assert all(lora.lora_dim == 16 and lora.dropout.p == 0.05 and lora.bypass_mode for _, lora in adapter._modules)
    assert {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()} == before
    del full_size.lycoris


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_packing_is_the_pipelines(channels: int, rows: int, columns: int) -> None:
    latents = torch.arange(2 * channels * rows * columns * 4.0).view(2, channels, 2 * rows, 2 * columns)
    wanted = FluxKontextPipeline._pack_latents(latents, 2, channels, 2 * rows, 2 * columns)
    assert torch.equal(pack(latents), wanted)
    assert torch.equal(unpack(wanted, 2 * rows, 2 * columns), latents)


def test_where_several_references_lie() -> None:
    assert reference_offsets([(128, 128)] * 3) == [(0, 0), (128, 0), (0, 128)]


def objective(**options: Any) -> FlowObjective:
    return FlowObjective({}, LossOptions(**options), FluxOptions(), seed=3, patch=2)


def test_levels() -> None:
    """Goldens of training.md §4.2."""
    assert math.exp(sampler_mu({}, 1024)) == pytest.approx(1.878, abs=5e-4)
    assert math.exp(sampler_mu({}, 4096)) == pytest.approx(3.158, abs=5e-4)
    shape = torch.Size((1, 16, 128, 128))
    assert objective().shift(shape) == 3 and objective(flow_schedule_auto_shift=True).shift(shape) == pytest.approx(
        3.158, abs=5e-4
    )
    visits = [(f"set/{index}", 0) for index in range(4000)]
    zeros = torch.zeros(4000, 1, 2, 2)
    even = objective(flow_use_uniform_schedule=True, flow_schedule_shift=3.0).draw(zeros, visits, step=0, first=0)
    assert (even.level_B < 0.75).float().mean().item() == pytest.approx(0.5, abs=0.03), "σ .5 becomes .75"
    normal = objective(flow_schedule_shift=1.0).draw(zeros, visits, step=0, first=0)
    logit = torch.logit(normal.level_B)
    assert logit.mean().item() == pytest.approx(0, abs=0.05) and logit.std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(normal.t_B, 1000 * normal.level_B)


def test_the_line_from_picture_to_noise() -> None:
    x, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    noised = objective().at_levels(x, noise, [0.0, 0.25, 1.0])
    assert torch.equal(noised.latents_BCHW[0], x[0]) and torch.equal(noised.latents_BCHW[2], noise[2])
    assert torch.allclose(noised.latents_BCHW[1], 0.75 * x[1] + 0.25 * noise[1])
    assert torch.equal(noised.target_BCHW, noise - x)


class Heard(Exception):
    """The network was called; it need not answer."""


def call_of(denoiser: torch.nn.Module, act: Any) -> dict[str, Any]:
    """What `act` passes to the network when it first calls it."""
    heard: dict[str, Any] = {}

    def listen(_: Any, args: tuple[Any, ...], keys: dict[str, Any]) -> None:
        heard.update(keys)
        raise Heard

    hook = denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    with pytest.raises(Heard):
        act()
    hook.remove()
    return heard


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_feeds_what_the_official_pipeline_feeds(world: TinyWorld, precision: str) -> None:
    """Acceptance 25 and 26: number for number, the reference's pixels to latents and the timestep included."""
    options = KONTEXT | {"flux_guidance_value": 2.5, "base_model_default_dtype": precision, "vae_dtype": precision}
    family: Any = build_family(world.resolve(**options).require(), load_spec("flux"))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    picture = Image.open(next(iter(sorted(world.pictures.iterdir()))))
    pipeline = FluxKontextPipeline.from_pretrained(NANO, torch_dtype=dtype)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampled = {"height": 64, "width": 64, "max_area": 64 * 64, "num_inference_steps": 3, "guidance_scale": 2.5}
    official = call_of(
        pipeline.transformer,
        lambda: pipeline(picture, "make it grey", latents=pack(noise), max_sequence_length=32, _auto_resize=False,
                         **sampled),
    )  # fmt: skip
    text = family.load_caption_encoder(torch.device("cpu")).encode(["make it grey"])
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
    (reference,) = family.load_picture_encoder(torch.device("cpu")).encode(pixels, ["00" * 32], sample=False)
    batch = Batch(
        latents_BCHW=noise, text=family.collate_text(text), samples=("edit/a",), visits=(0,), captions=("",),
        dataset_id="edit", target=(64, 64), position=START, next_position=START, references=(reference[None],),
    )  # fmt: skip
    denoiser = family.load_denoiser()
    ours = call_of(denoiser, lambda: family.predict(denoiser, noise, 1000 * official["timestep"].float(), batch))
    for name in ("hidden_states", "timestep", "guidance", "pooled_projections", "encoder_hidden_states", "txt_ids",
                 "img_ids"):  # fmt: skip
        assert isinstance(ours[name], Tensor) and ours[name].dtype == official[name].dtype, name
        assert torch.equal(ours[name], official[name]), name


def test_random_guidance_is_keyed_by_the_visit(world: TinyWorld) -> None:
    options = KONTEXT | {"flux_guidance_mode": "random-range", "flux_guidance_min": 1.0, "flux_guidance_max": 3.0}
    family: Any = build_family(world.resolve(**options).require(), load_spec("flux"))
    denoiser = family.load_denoiser()
    rows = [
        Batch(
            latents_BCHW=torch.zeros(2, 4, 8, 8), text={}, samples=("a", "b"), visits=(visit, visit),
            captions=("", ""), dataset_id="edit", target=(64, 64), position=START, next_position=START,
        )
        for visit in (0, 0, 1)
    ]  # fmt: skip
    first, again, later = (family._guidance(denoiser, row, torch.device("cpu")) for row in rows)
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert all(1 <= value <= 3 for value in [*first.tolist(), *later.tolist()])


def test_sizes_are_those_asked_for(world: TinyWorld, tmp_path: Path) -> None:
    """Acceptance 27, and the images of an edit family: prompts × references."""
    ran = world.run(
        **KONTEXT | {"output_dir": "sizes", "max_train_steps": 1, "validation_disable": False,
                     "disable_benchmark": True, "validation_prompt": "grey", "validation_resolution": "96x64",
                     "num_eval_images": 2, "validation_num_inference_steps": 2, "validation_step_interval": 0}
    )  # fmt: skip
    files = sorted((ran.output / "validation_images").iterdir())
    assert [f.name for f in files] == [
        f"step_1_{name}_{index}_96x64.png" for name in ("unconditional", "validation") for index in (0, 1)
    ]
    assert all(Image.open(file).size == (96, 64) for file in files)
    assert Image.open(files[0]).tobytes() != Image.open(files[1]).tobytes(), "each begins with its own reference"
