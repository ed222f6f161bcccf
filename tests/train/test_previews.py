"""Images while they are sampled: which, of what, and that they change nothing. Acceptance 46."""

from __future__ import annotations

import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from flux_world import KONTEXT, paired_world
from PIL import Image
from tiny_world import Ran, TinyWorld
from torch import Tensor

from simpletuner.events import ValidationImageData
from simpletuner.families.registry import load_spec
from simpletuner.families.samplers import build_sampler
from simpletuner.families.watching import Watch, watched
from simpletuner.train.preview import LinearMap, Previews, shown_steps

NANO = Path(load_spec("pixart_sigma").flavours["nano"].repository)
DRAW: dict[str, Any] = {
    "max_train_steps": 1, "validation_disable": False, "disable_benchmark": True, "validation_step_interval": 0,
    "validation_prompt": "red apple", "validation_disable_unconditional": True, "validation_resolution": "64x64",
    "validation_num_inference_steps": 20, "validation_preview": True, "validation_preview_steps": 4,
    "user_prompt_library": {"night bench": "night bench shot"}, "validation_seed": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("nano"), NANO, sizes=((64, 64),))


def images(ran: Ran) -> list[dict[str, Any]]:
    return ran.of_type("validation.image")


def test_which_steps_are_shown() -> None:
    assert sorted(shown_steps(20, 4)) == [1, 5, 9, 13, 17, 20]
    assert sorted(shown_steps(4, 1)) == [1, 2, 3, 4]
    assert sorted(shown_steps(3, 9)) == [1, 3]


def test_previews_of_a_run(nano: TinyWorld) -> None:
    ran = nano.run(**DRAW, output_dir="shown")
    bench = [event for event in images(ran) if event["data"]["shortname"] == "night_bench"]
    kinds = [(event["data"]["validation_type"], event["data"]["step"]) for event in bench]
    assert kinds == [("intermediary", step) for step in (1, 5, 9, 13, 17, 20)] + [("final", 20)]
    second = bench[1]
    assert second["title"] == "Validation (step 5/20): night_bench" and second["body"] == "night bench shot"
    assert second["data"]["step_label"] == "5/20" and second["data"]["resolution"] == [64, 64]
    assert second["data"]["prompt"] == "night bench shot" and 0 < second["data"]["timestep"] < 1000
    pictures = [Image.open(ran.job.artifacts / event["images"][0]["artifact_id"]).convert("RGB") for event in bench]
    assert all(picture.size == (64, 64) for picture in pictures)
    assert distance(pictures[5], pictures[6]) < distance(pictures[0], pictures[6]), "the last is nearest to the image"
    assert distance(pictures[5], pictures[6]) < 30


def distance(a: Image.Image, b: Image.Image) -> float:
    return sum(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) / len(a.tobytes())


def test_previews_change_no_pixel(nano: TinyWorld) -> None:
    shown = nano.run(**DRAW, output_dir="with")
    plain = nano.run(**DRAW | {"validation_preview": False}, output_dir="without")
    assert not [event for event in images(plain) if event["data"]["validation_type"] == "intermediary"]
    files = sorted(path.name for path in (plain.output / "validation_images").iterdir())
    for name in files:
        pair = [Image.open(ran.output / "validation_images" / name).tobytes() for ran in (shown, plain)]
        assert pair[0] == pair[1], name


def test_an_edit_is_previewed_too(tmp_path: Path) -> None:
    world = paired_world(tmp_path)
    options = KONTEXT | DRAW | {"validation_num_inference_steps": 4, "num_eval_images": 1, "user_prompt_library": ""}
    ran = world.run(**options | {"validation_preview_steps": 2})
    steps = [event["data"]["step"] for event in images(ran) if event["data"]["validation_type"] == "intermediary"]
    assert steps == [1, 3, 4]
    assert not ran.notices("preview_failed") and not ran.notices("preview_fallback")


def test_without_a_decoder_a_linear_map_does(nano: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    flavour = load_spec("pixart_sigma").flavours["nano"]
    monkeypatch.setattr(type(flavour), "__setattr__", object.__setattr__)
    monkeypatch.setattr(flavour, "preview_decoder", str(nano.root / "absent"))
    ran = nano.run(**DRAW, output_dir="coarse")
    assert len(ran.notices("preview_fallback")) == 1
    last = [event for event in images(ran) if event["data"]["validation_type"] == "intermediary"][-1]
    picture = Image.open(ran.job.artifacts / last["images"][0]["artifact_id"])
    assert picture.size == (8, 8)
    final = Image.open(sorted((ran.output / "validation_images").iterdir())[-1]).convert("RGB")
    assert distance(picture.convert("RGB"), final.resize((8, 8), Image.Resampling.BOX)) < 40


def test_a_linear_map_finds_what_is_linear() -> None:
    weight = torch.randn(5, 3)
    latents = [torch.randn(4, 3, 5), torch.randn(4, 6, 2)]
    pictures = [
        (torch.cat([z.flatten(1).T, torch.ones(z[0].numel(), 1)], 1) @ weight).T.unflatten(1, z.shape[-2:])
        for z in latents
    ]
    wide = [picture.repeat_interleave(8, 1).repeat_interleave(8, 2) for picture in pictures]
    found = LinearMap.fit(latents, wide)
    assert torch.allclose(found.weight, weight, atol=1e-4)
    assert torch.allclose(found(latents[1]), pictures[1], atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler-a", "unipc", "dpm++", None])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_is_shown_is_the_samplers_clean_estimate(name: Any, prediction: str) -> None:
    """A network that knows the truth says the same clean latents at every step."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "beta_start": 1e-4, "beta_end": 0.02,
              "beta_schedule": "linear", "prediction_type": prediction}  # fmt: skip
    scheduler: Any = build_sampler(config, name, prediction)  # pyright: ignore[reportArgumentType]
    scheduler.set_timesteps(8)
    clean = torch.randn(1, 4, 2, 2)
    seen: list[Tensor] = []
    sample = torch.randn(1, 4, 2, 2) * scheduler.init_noise_sigma
    steps = len(scheduler.timesteps)
    watch = Watch(frozenset(range(1, steps + 1)), lambda step, t, latents: seen.append(latents))
    with watched(scheduler, watch):
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t)
            alpha = scheduler.alphas_cumprod[int(t)]
            noise = (scaled - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            output = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            sample = scheduler.step(output, t, sample, return_dict=False)[0]
    assert len(seen) == steps
    assert all(torch.allclose(latents, clean, atol=2e-2) for latents in seen)
    assert "step" not in vars(scheduler)


def test_a_flow_samplers_clean_estimate() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    clean, seen = torch.randn(1, 4, 2, 2), list[Tensor]()
    sample = noise = torch.randn(1, 4, 2, 2)
    with watched(scheduler, Watch(frozenset({1, 3, 5}), lambda step, t, latents: seen.append(latents))):
        for t in scheduler.timesteps:
            sample = scheduler.step(noise - clean, t, sample, return_dict=False)[0]
    assert len(seen) == 3 and all(torch.allclose(latents, clean, atol=1e-4) for latents in seen)


class Said:
    """What a reporter is asked for."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.warnings: list[str] = []

    def image(self, data: ValidationImageData, name: str, content: bytes, mime_type: str) -> None:
        Image.open(BytesIO(content)).verify()
        self.steps.append(data.step)

    def warn(self, code: str, message: str) -> None:
        self.warnings.append(code)


IMAGE = ValidationImageData(
    step=10, timestep=0, resolution=(8, 8), validation_type="final", prompt="", step_label="10/10", global_step=1,
    shortname="x",
)  # fmt: skip


def test_a_slow_decoder_drops_all_but_the_last() -> None:
    said, may_go = Said(), threading.Event()

    def decode(latents: Tensor) -> Tensor:
        may_go.wait(10)
        return latents[:3]

    previews = Previews(lambda: decode, 1, said)  # pyright: ignore[reportArgumentType]
    watch = previews.watch(IMAGE)
    for step in range(1, 11):
        watch.show(step, 0.0, torch.zeros(1, 4, 2, 2))
    may_go.set()
    previews.finish()
    assert said.steps == [1, 2, 3, 4, 10]
    previews.close()


def test_a_decoder_that_fails_is_said_once() -> None:
    said = Said()

    def decode(latents: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    previews = Previews(lambda: decode, 1, said)  # pyright: ignore[reportArgumentType]
    for step in (1, 2, 10):
        previews.watch(IMAGE).show(step, 0.0, torch.zeros(1, 4, 2, 2))
    previews.finish()
    assert said.warnings == ["preview_failed"] and said.steps == []
    previews.close()
