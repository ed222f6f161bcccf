"""Adapters: what is trained, what is written, who can read it, and what is refused. Acceptance 34–38."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from flux_world import KONTEXT, NANO, paired_world
from lycoris.wrapper import create_lycoris_from_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from test_restart import same_end_of
from tiny_world import Ran, TinyWorld

from simpletuner.errors import UserError
from simpletuner.families.registry import load_spec
from simpletuner.job import CommandName
from simpletuner.train.adapters import WEIGHTS, attach_adapter

GOLDENS = Path(__file__).parents[1] / "goldens"
LYCORIS = KONTEXT | {"lora_type": "lycoris"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return paired_world(tmp_path_factory.mktemp("adapters"))


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 32, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 128, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([2.0]),
        "img_ids": torch.zeros(32, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }


@torch.no_grad()
def answer(denoiser: Any) -> torch.Tensor:
    return denoiser.eval()(**inputs())[0]


def base() -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(NANO / "transformer", torch_dtype=torch.float32)


def trained(world: TinyWorld, ran: Ran, **options: Any) -> FluxTransformer2DModel:
    """The network as the trainer had it at its end, from the checkpoint's own state."""
    denoiser = base()
    adapter = attach_adapter(denoiser, world.resolve(**options).require(), load_spec("flux"))
    adapter.load(load_file(ran.output / f"checkpoint-{ran.metrics()[-1]['step']}" / WEIGHTS))
    return denoiser


@pytest.mark.parametrize("alpha", [0.5, 8.0])
def test_diffusers_reads_a_lora_as_it_was_trained(world: TinyWorld, alpha: float) -> None:
    """Acceptance 36, 37."""
    options = KONTEXT | {"lora_alpha": alpha, "output_dir": f"lora{alpha}", "learning_rate": 0.01}
    ran = world.run(**options)
    wanted = answer(trained(world, ran, **options))
    pipeline = FluxKontextPipeline.from_pretrained(NANO, torch_dtype=torch.float32)
    pipeline.load_lora_weights(ran.output)
    assert torch.allclose(answer(pipeline.transformer), wanted, atol=1e-5)
    assert not torch.allclose(answer(base()), wanted, atol=1e-3)


def test_diffusers_reads_the_export_of_a_lycoris_lora(world: TinyWorld) -> None:
    """And its own pipeline, with the exported file, draws the trainer's last validation image."""
    options = LYCORIS | {
        "output_dir": "drawn", "learning_rate": 0.01, "lora_alpha": 2.0, "validation_disable": False,
        "validation_prompt": "grey", "validation_disable_unconditional": True, "validation_resolution": "64x64",
        "num_eval_images": 1, "validation_num_inference_steps": 3, "disable_benchmark": True, "validation_seed": 5,
    }  # fmt: skip
    ran = world.run(**options)
    pipeline = FluxKontextPipeline.from_pretrained(NANO, torch_dtype=torch.float32)
    pipeline.load_lora_weights(ran.output / "export", weight_name="adapter_diffusers.safetensors")
    assert torch.allclose(answer(pipeline.transformer), answer(trained(world, ran, **options)), atol=1e-5)
    reference = Image.open(sorted(world.pictures.iterdir())[0])
    drawn = pipeline(
        reference, "grey", height=64, width=64, max_area=64 * 64, num_inference_steps=3, guidance_scale=2.5,
        generator=torch.Generator().manual_seed(5), max_sequence_length=32, _auto_resize=False,
    ).images[0]  # fmt: skip
    shown = Image.open(ran.output / "validation_images/step_4_validation_0_64x64.png")
    difference = np.abs(np.asarray(drawn, np.int16) - np.asarray(shown, np.int16))
    assert difference.max() <= 1, "rounding of the last bit at most"


CONFIGS: list[dict[str, Any]] = [
    {"algo": "lora", "linear_dim": 4, "linear_alpha": 0.5},
    {"algo": "locon", "linear_dim": 4, "linear_alpha": 2},
    {"algo": "loha", "linear_dim": 2, "linear_alpha": 1},
    {"algo": "lokr", "factor": 4},
    {"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "factor": 4},
    {"algo": "full"},
    {"algo": "boft", "linear_dim": 4, "linear_alpha": 4},
    {"algo": "diag-oft", "linear_dim": 4, "linear_alpha": 4},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda row: "-".join(map(str, row.values())))
def test_the_library_reads_a_lycoris_file_as_it_was_trained(world: TinyWorld, config: dict[str, Any]) -> None:
    name = "-".join(map(str, config.values()))
    options = LYCORIS | {"lycoris_config": config, "output_dir": name, "learning_rate": 0.01, "max_train_steps": 2}
    ran = world.run(**options)
    wanted = answer(trained(world, ran, **options))
    fresh = base()
    network, _ = create_lycoris_from_weights(1.0, str(ran.output / WEIGHTS), fresh)
    assert len(network.loras) == 25
    network.apply_to()
    assert torch.allclose(answer(fresh), wanted, atol=1e-4)
    assert not torch.allclose(answer(base()), wanted, atol=1e-3)
    assert json.loads((ran.output / "lycoris_config.json").read_text())["algo"] == config["algo"]


def test_without_a_configuration_rank_alpha_and_dropout_decide(world: TinyWorld) -> None:
    ran = world.run(**LYCORIS | {"lora_rank": 8, "lora_dropout": 0.05, "output_dir": "made", "max_train_steps": 1})
    config = json.loads((ran.output / "lycoris_config.json").read_text())
    assert (config["algo"], config["linear_dim"], config["linear_alpha"], config["dropout"]) == ("lora", 8, 8, 0.05)
    tensors = load_file(ran.output / WEIGHTS)
    assert {value.shape[0] for key, value in tensors.items() if key.endswith("lora_down.weight")} == {8}


@pytest.mark.parametrize("precision", [pytest.param("no_change", marks=pytest.mark.long), "int8-quanto"])
def test_going_on_is_never_having_stopped(world: TinyWorld, precision: str) -> None:
    """The exactness law over a frozen base, dropout drawn from the generators that are restored."""
    options = LYCORIS | {
        "base_model_precision": precision, "max_train_steps": 6, "gradient_accumulation_steps": 2, "lora_dropout": 0.2,
        "checkpoint_step_interval": 3, "use_ema": True, "optimizer": "optimi-lion",
    }  # fmt: skip
    straight = world.run(output_dir=f"straight-{precision}", **options)
    code = "import os, signal, torch\nplain, left = torch.Tensor.backward, [9]\n"
    code += "def backward(self, *a, **k):\n    left[0] -= 1\n"
    code += "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n    plain(self, *a, **k)\n"
    name = f"killed-{precision}"
    assert world.spawn(world.job(output_dir=name, **options), before=code + "torch.Tensor.backward = backward\n").code
    same_end_of(world.run(output_dir=name, **options), straight, 6, [WEIGHTS, f"ema/{WEIGHTS}"])


def test_an_adapter_without_a_schedule_goes_on_from_its_steps_and_shows_their_average(world: TinyWorld) -> None:
    pytest.importorskip("schedulefree")
    options = KONTEXT | {
        "optimizer": "adamw_schedulefree", "max_train_steps": 6, "checkpoint_step_interval": 3, "learning_rate": 0.01,
        "validation_disable": False, "validation_prompt": "grey", "validation_disable_unconditional": True,
        "validation_resolution": "64x64", "num_eval_images": 1, "validation_num_inference_steps": 1,
        "validation_step_interval": 2, "disable_benchmark": True,
    }  # fmt: skip
    straight = world.run(output_dir="free-straight", **options)
    world.run_until(3, CommandName.STOP, output_dir="free-halves", **options)
    same_end_of(world.run(output_dir="free-halves", **options), straight, 6, [WEIGHTS])
    final = straight.output / "checkpoint-6"
    average, steps = load_file(final / WEIGHTS), load_file(final / "optimizer-rank0.safetensors")["weights.0"]
    assert all(torch.equal(value, average[key]) for key, value in load_file(straight.output / WEIGHTS).items())
    assert sum(value.abs().sum() for value in average.values()) != pytest.approx(steps.abs().sum().item(), rel=1e-4)
    images = [Image.open(straight.output / f"validation_images/step_{n}_validation_0_64x64.png") for n in (4, 6)]
    assert images[0].info["simpletuner"] != images[1].info["simpletuner"]


def test_the_base_is_never_written(world: TinyWorld) -> None:
    ran = world.run(**LYCORIS | {"output_dir": "light", "max_train_steps": 1})
    assert {path.name for path in ran.output.rglob("*.safetensors") if "cache" not in path.parts} == {
        WEIGHTS, "adapter_comfyui.safetensors", "adapter_diffusers.safetensors", "optimizer-rank0.safetensors",
        "rng-rank0.safetensors",
    }  # fmt: skip


def test_an_adapter_begins_where_another_ended(world: TinyWorld) -> None:
    first = world.run(**KONTEXT | {"output_dir": "begun", "max_train_steps": 1, "learning_rate": 0.01})
    file = str(first.output / WEIGHTS)
    second = world.run(**KONTEXT | {"output_dir": "onward", "max_train_steps": 1, "init_lora": file,
                                    "learning_rate": 1e-12})  # fmt: skip
    one, other = load_file(file), load_file(second.output / WEIGHTS)
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


@pytest.mark.parametrize("lora_type", ["standard", "lycoris"])
def test_loss_golden(world: TinyWorld, request: pytest.FixtureRequest, lora_type: str) -> None:
    """Acceptance 33: 20 steps on the CPU in fp32. A change here is a change of the maths: name it in CHANGELOG.md."""
    ran = world.run(**KONTEXT | {"lora_type": lora_type, "output_dir": f"golden-{lora_type}", "max_train_steps": 20})
    rows = [{key: row[key] for key in ("step", "loss", "grad_norm")} for row in ran.metrics()]
    file = GOLDENS / f"flux_{lora_type}_losses.json"
    if request.config.getoption("--write-goldens"):
        file.write_text(json.dumps(rows, indent=1) + "\n")
    for found, kept in zip(rows, json.loads(file.read_text()), strict=True):
        assert found == pytest.approx(kept, rel=1e-3), "another processor's matrix products differ by a tenth of it"
    losses = ran.losses()
    assert sum(losses[-4:]) < sum(losses[:4])


def test_another_rank_is_another_run(world: TinyWorld) -> None:
    options = LYCORIS | {"output_dir": "ranks", "max_train_steps": 1}
    world.run(**options)
    assert code_of(world, **options | {"lora_rank": 8, "max_train_steps": 2}) == "resume_incompatible"
    assert code_of(world, **options | {"lora_type": "standard", "max_train_steps": 2}) == "resume_incompatible"


def code_of(world: TinyWorld, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        world.run(**options)
    return raised.value.code


def test_what_is_refused_before_the_first_step(world: TinyWorld, tmp_path: Path) -> None:
    nothing = {"algo": "lora", "linear_dim": 4, "linear_alpha": 4, "apply_preset": {"target_module": ["NoSuchClass"]}}
    assert code_of(world, **LYCORIS | {"lycoris_config": nothing}) == "adapter_matched_nothing"
    assert code_of(world, **KONTEXT | {"lora_rank": 4096}) == "adapter_rank_too_large"
    assert code_of(world, **LYCORIS | {"lora_rank": 4096}) == "adapter_rank_too_large"
    assert code_of(world, **KONTEXT | {"base_model_precision": "fp8-torchao"}) == "precision_unavailable"
    other = world.run(**KONTEXT | {"output_dir": "other", "max_train_steps": 1}).output / WEIGHTS
    assert code_of(world, **KONTEXT | {"lora_rank": 8, "init_lora": str(other)}) == "adapter_unknown_keys"


def init_lora_problem(world: TinyWorld, path: Path, **options: Any) -> str:
    (found,) = world.resolve(**options | {"init_lora": str(path)}).errors
    assert found.pointer == "/--init_lora"
    return found.code


def test_a_file_to_start_from_is_looked_at_before_anything_loads(world: TinyWorld, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    keys = {"transformer.a.lora_A.weight": torch.zeros(1, 2), "transformer.a.lora_B.weight": torch.zeros(2, 1)}
    save_file(keys, lora, metadata={"modelspec.architecture": "Flux.1-dev/lora"})
    assert world.resolve(**KONTEXT | {"init_lora": str(lora)}).errors == []
    assert init_lora_problem(world, lora, **LYCORIS) == "adapter_other_kind"
    assert init_lora_problem(world, lora, model_type="lora", model_flavour="900M-1024-v0.6") == "adapter_other_family"
    lycoris = tmp_path / "lycoris.safetensors"
    save_file({"lycoris_a.lokr_w1": torch.zeros(2, 2)}, lycoris)
    assert init_lora_problem(world, lycoris, **KONTEXT) == "adapter_other_kind"
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}, lycoris)
    assert init_lora_problem(world, lycoris, **KONTEXT) == "adapter_other_kind"
    for content in (
        b"",
        b"not tensors at all",
        (8).to_bytes(8, "little") + b"[1, 2,3]",
        (19).to_bytes(8, "little") + b'{"__metadata__": 5}',
        b"\xff" * 64,
    ):
        lycoris.write_bytes(content)
        assert init_lora_problem(world, lycoris, **KONTEXT) == "adapter_unreadable"
    assert init_lora_problem(world, tmp_path / "none", **KONTEXT) == "adapter_unreadable"
    assert init_lora_problem(world, tmp_path, **KONTEXT) == "adapter_unreadable"


@pytest.mark.parametrize("options", [KONTEXT | {"lora_alpha": 1e-60}, LYCORIS | {"lora_alpha": 1e-60}])
def test_an_adapter_that_has_no_effect_is_told_after_one_step(world: TinyWorld, options: dict[str, Any]) -> None:
    name = f"dead-{options.get('lora_type')}"
    ran = world.main(world.job(**options, output_dir=name, max_train_steps=30))
    assert ran.code == 72 and [row["step"] for row in ran.metrics()] == [1]
    error = ran.events[-1]
    assert error["data"]["code"] == "dead_run" and "25 modules" in error["message"]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"lycoris_config": {"algo": "lokrr"}}, "/--lycoris_config/algo", "unknown_algo"),
    ({"lycoris_config": {"algo": "lora", "rnk": 4}}, "/--lycoris_config/rnk", "unknown_lycoris_key"),
    ({"lycoris_config": {"apply_preset": "attn"}}, "/--lycoris_config/apply_preset", "unknown_preset"),
    ({"lycoris_config": {"apply_preset": {"targets": []}}}, "/--lycoris_config/apply_preset/targets", "unknown_preset"),
    ({"lycoris_config": {"linear_alpha": "much"}}, "/--lycoris_config/linear_alpha", "bad_value"),
    ({"lycoris_config": "nowhere.json"}, "/--lycoris_config", "lycoris_config_missing"),
    ({"model_type": "full", "base_model_precision": "int8-quanto"}, "/--base_model_precision", "quantised_full"),
    ({"lycoris_config": {"algo": "ia3"}}, "/--lycoris_config/algo", "option_not_supported_yet"),
    (
        {"lycoris_config": {"algo": "full"}, "base_model_precision": "int8-quanto"},
        "/--lycoris_config/algo",
        "incompatible_options",
    ),
    (
        {"lycoris_config": {"algo": "boft"}, "base_model_precision": "nf4-bnb"},
        "/--lycoris_config/algo",
        "incompatible_options",
    ),
    ({"model_flavour": "schnell"}, "/--flux_fast_schedule", "incompatible_options"),
    ({"eval_dataset_id": "nobody"}, "/--eval_dataset_id", "bad_choice"),
]


@pytest.mark.parametrize(("options", "pointer", "code"), BAD)
def test_a_mistake_is_named_with_its_place(world: TinyWorld, options: dict[str, Any], pointer: str, code: str) -> None:
    found = {problem.pointer: problem.code for problem in world.resolve(**LYCORIS | options).errors}
    assert found.get(pointer) == code, found


IDLE: list[dict[str, Any]] = [
    {"validation_noise_scheduler": "euler"},
    {"validation_negative_prompt": "blurry"},
    {"refiner_training": True},
    {"flux_guidance_max": 3.0},
    {"flow_beta_schedule_alpha": 3.0},
    {"masked_loss_probability": 0.5},
]


@pytest.mark.parametrize("options", IDLE, ids=lambda row: next(iter(row)))
def test_what_cannot_act_on_kontext_says_so(world: TinyWorld, options: dict[str, Any]) -> None:
    found = {problem.option for problem in world.resolve(**LYCORIS | options).warnings}
    assert next(iter(options)) in found


def test_kontext_needs_references_and_clip_skip_does_nothing(world: TinyWorld) -> None:
    entries = world.entries
    world.entries = [{key: value for key, value in entries[0].items() if key != "conditioning_data"}]
    codes = {problem.pointer: problem.code for problem in world.resolve(**LYCORIS | {"clip_skip": 2}).problems}
    world.entries = entries
    assert codes["/datasets/0/conditioning_data"] == "conditioning_required"
    assert codes["/--clip_skip"] == "option_no_effect"
