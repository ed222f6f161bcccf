"""Validation on pictures that a prompt brings itself."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from flux_world import KONTEXT, paired_world
from PIL import Image
from tiny_world import TinyWorld

from simpletuner.config.prompt import plan_prompts
from simpletuner.data.cache import CacheStore
from simpletuner.errors import ExitCode
from simpletuner.families.base import build_family
from simpletuner.families.registry import load_spec
from simpletuner.train.references import plan_free, prompt_reference

DRAW: dict[str, Any] = KONTEXT | {
    "max_train_steps": 1, "validation_disable": False, "disable_benchmark": True, "num_eval_images": 2,
    "validation_num_inference_steps": 1, "validation_step_interval": 0, "validation_disable_unconditional": True,
    "validation_resolution": "64x64",
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> TinyWorld:
    return paired_world(tmp_path)


def test_sizes_are_those_that_were_published() -> None:
    sizes = load_spec("flux").flavours["kontext"].reference_sizes
    assert list(sizes) == pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    for source in [(1000, 1000), (300, 4000), (640, 480), (1023, 777), (1064, 1024)]:
        ratio = source[0] / source[1]
        assert plan_free(source, sizes).target == min((abs(ratio - w / h), w, h) for w, h in sizes)[1:], source
    assert "PREFERRED_KONTEXT_RESOLUTIONS" in inspect.getsource(FluxKontextPipeline.__call__)


def test_a_prompt_is_drawn_on_its_own_picture(world: TinyWorld) -> None:
    Image.linear_gradient("L").convert("RGB").resize((150, 90)).save(world.root / "wide.png")
    library = {"own": {"prompt": "grey it", "image": "wide.png"}, "shared": "grey it"}
    ran = world.run(**DRAW | {"user_prompt_library": library})
    drawn = {event["data"]["shortname"] + str(event["data"]["index"]) for event in ran.of_type("validation.image")}
    assert drawn == {"own0", "shared0", "shared1"}
    images = ran.output / "validation_images"
    facts = json.loads(Image.open(images / "step_1_own_0_64x64.png").text["simpletuner"])
    assert facts["reference"] == str(world.root / "wide.png")
    pixels = {name: Image.open(images / f"step_1_{name}_0_64x64.png").tobytes() for name in ("own", "shared")}
    assert pixels["own"] != pixels["shared"]


def test_its_latents_are_those_of_the_official_pipeline(world: TinyWorld) -> None:
    picture = Image.radial_gradient("L").convert("RGB").resize((150, 90))
    picture.save(world.root / "wide.png")
    options = DRAW | {"user_prompt_library": {"own": {"prompt": "x", "image": "wide.png"}}}
    config = world.resolve(**options).require()
    family = build_family(config, load_spec("flux"))
    vae: Any = family.load_autoencoder(torch.device("cpu"))
    pipeline: Any = FluxKontextPipeline(None, vae, None, None, None, None, None)  # pyright: ignore[reportArgumentType]
    pixels = pipeline.image_processor.preprocess(pipeline.image_processor.resize(picture, 48, 80), 48, 80)
    wanted = pipeline._encode_vae_image(pixels.to(vae.dtype), generator=torch.Generator())
    world.run(**options)
    prompt = next(prompt for prompt in plan_prompts(config.validation) if prompt.images)
    store = CacheStore(Path(config.image_datasets[0].cache_dir_vae))
    encoder = family.load_picture_encoder(torch.device("cpu"))
    sizes = load_spec("flux").flavours["nano"].reference_sizes
    found = prompt_reference(prompt, sizes, encoder, store)
    assert found.sizes == ((80, 48),)
    assert torch.equal(found.latents[0], wanted[0])


@pytest.mark.parametrize(
    ("library", "code"),
    [
        ({"a": {"prompt": "x", "image": "absent.png"}}, "prompt_image_missing"),
        ({"a": {"prompt": "x", "picture": "y.png"}}, "bad_prompt_library"),
        ({"a": {"prompt": "x", "adapter_strength": 0.5}}, "option_not_supported_yet"),
        ({"a": {"image": "y.png"}}, "bad_prompt_library"),
    ],
)
def test_a_wrong_library_is_told_at_validation(world: TinyWorld, library: dict[str, Any], code: str) -> None:
    Image.new("RGB", (64, 64)).save(world.root / "y.png")
    found = world.resolve(**DRAW | {"user_prompt_library": library})
    assert [(problem.code, problem.pointer) for problem in found.errors] == [(code, "/--user_prompt_library")]


def test_a_picture_that_is_none_ends_the_run_before_the_model_is_loaded(world: TinyWorld) -> None:
    (world.root / "no.png").write_text("no picture")
    library = {"a": {"prompt": "x", "image": "no.png"}}
    ran = world.main(world.job(**DRAW | {"user_prompt_library": library}))
    assert ran.code == ExitCode.DATA
    assert ran.events[-1]["data"]["code"] == "prompt_image_unreadable"
    assert not [event for event in ran.events if event.get("stage", {}).get("key") == "init_load_base_model"]


def test_without_references_a_picture_has_no_effect(shared: TinyWorld) -> None:
    Image.new("RGB", (64, 64)).save(shared.root / "y.png")
    found = shared.resolve(user_prompt_library={"a": {"prompt": "x", "image": "y.png"}}, validation_disable=False)
    assert [problem.code for problem in found.problems if problem.option == "user_prompt_library"] == [
        "option_no_effect"
    ]
    assert not found.errors
