"""Whole runs of the real trainer on tiny random weights. training.md §4.1, §6–§8. Acceptance 33, 44–47, 51."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_world import Ran, TinyWorld

from simpletuner.errors import ExitCode
from simpletuner.job import CommandName

GOLDENS = Path(__file__).parents[1] / "goldens"
EMA = {"use_ema": True, "ema_decay": 0.9}


def test_loss_golden(shared: TinyWorld, request: pytest.FixtureRequest) -> None:
    """20 steps on the CPU in fp32. A change here is a change of the maths: name it in CHANGELOG.md."""
    ran = shared.run(output_dir="golden", max_train_steps=20, gradient_accumulation_steps=2, **EMA)
    rows = [{key: row[key] for key in ("step", "loss", "grad_norm", "learning_rate")} for row in ran.metrics()]
    file = GOLDENS / "pixart_full_losses.json"
    if request.config.getoption("--write-goldens"):
        file.write_text(json.dumps(rows, indent=1) + "\n")
    for found, kept in zip(rows, json.loads(file.read_text()), strict=True):
        assert found == pytest.approx(kept, rel=1e-3), "another processor's matrix products differ by a tenth of it"
    assert ran.metrics()[-1]["epoch"] == 3, "24 pictures of three buckets, 4 a step"


# --- laws (§4.1)


def same_losses(one: Ran, other: Ran, rel: float) -> None:
    assert len(one.losses()) == len(other.losses()) > 2
    assert one.losses() == pytest.approx(other.losses(), rel=rel)
    norms = [[row["grad_norm"] for row in ran.metrics()] for ran in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=10 * rel)


def test_a_batch_of_four_is_two_of_two(square: TinyWorld) -> None:
    """A gentle rate, so that the difference that is left is that of one step's rounding."""
    gentle = {"learning_rate": 1e-6, "max_train_steps": 4}
    whole = square.run(output_dir="b4", train_batch_size=4, **gentle)
    halves = square.run(output_dir="b2", train_batch_size=2, gradient_accumulation_steps=2, **gentle)
    same_losses(whole, halves, 1e-6)


def test_gradient_checkpointing_changes_nothing(shared: TinyWorld) -> None:
    on, off = (
        shared.run(output_dir=f"recompute{state}", gradient_checkpointing=state, max_train_steps=4)
        for state in (True, False)
    )
    same_losses(on, off, 1e-6)


def test_prefetch_changes_nothing(shared: TinyWorld) -> None:
    on, off = (
        shared.run(output_dir=f"ahead{state}", dataloader_prefetch=state, max_train_steps=6) for state in (True, False)
    )
    assert on.metrics() == off.metrics()
    for name, value in on.weights().items():
        assert torch.equal(value, off.weights()[name]), name


def test_the_seed_decides(shared: TinyWorld) -> None:
    one, again, other = (
        shared.run(output_dir=f"seed{index}", seed=seed, max_train_steps=3) for index, seed in enumerate((1, 1, 2))
    )
    assert one.losses() == again.losses()
    assert all(a != b for a, b in zip(one.losses(), other.losses(), strict=True))


def test_training_learns(square: TinyWorld) -> None:
    """And each parameter that is trained moves."""
    ran = square.run(output_dir="learns", max_train_steps=60, train_batch_size=8, learning_rate=5e-3)
    losses = ran.losses()
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    from safetensors.torch import load_file

    before = load_file(square.model / "transformer/diffusion_pytorch_model.safetensors")
    still = [name for name, value in ran.weights().items() if torch.equal(value, before[name])]
    assert still == ["pos_embed.pos_embed"] or still == []


def test_full_bf16(shared: TinyWorld) -> None:
    ran = shared.run(
        output_dir="bf16", base_model_default_dtype="bf16", mixed_precision="bf16", optimizer="adamw_bf16", **EMA
    )
    assert {value.dtype for value in ran.weights().values()} == {torch.bfloat16}
    assert {value.dtype for value in ran.weights(part="transformer_ema").values()} == {torch.float32}
    fp32 = shared.run(output_dir="fp32", optimizer="adamw_bf16")
    assert ran.losses() == pytest.approx(fp32.losses(), rel=0.03)


@pytest.mark.parametrize("optimizer", ["optimi-lion", "adamw_bf16"])
def test_other_optimizers_run(shared: TinyWorld, optimizer: str) -> None:
    ran = shared.run(output_dir=optimizer, optimizer=optimizer, base_model_default_dtype="bf16")
    assert ran.code is ExitCode.DONE and all(loss is not None for loss in ran.losses())


# --- caches (§3.8)


def encoded(ran: Ran) -> dict[str, tuple[int, int]]:
    """Kind → (encoded, reused)."""
    return {
        event["data"]["kind"]: (event["data"]["encoded"], event["data"]["reused"])
        for event in ran.notices("cache_report")
    }


def test_what_is_encoded_again(world: TinyWorld) -> None:
    one = {"max_train_steps": 1, "resume_from_checkpoint": ""}
    assert encoded(world.run(**one)) == {"captions": (25, 0), "latents": (24, 0)}
    assert encoded(world.run(**one)) == {"captions": (0, 25), "latents": (0, 24)}
    (world.pictures / "red_64x64.png").rename(world.pictures / "crimson_64x64.png")
    tomorrow = time.time() + 86400
    os.utime(world.pictures / "crimson_64x64.png", (tomorrow, tomorrow))
    ran = world.run(**one)
    assert encoded(ran) == {"captions": (1, 24), "latents": (0, 24)}, "an edited caption: one text"
    [warning] = ran.notices("dataset_changed")
    assert warning["message"].endswith("changed after the job was submitted: crimson_64x64.png.")
    world.pictures = world.pictures.rename(world.root / "moved")
    world.entries[0]["instance_data_dir"] = "moved"
    assert encoded(world.run(**one)) == {"captions": (0, 25), "latents": (0, 24)}, "a moved folder: nothing"
    world.entries[0] |= {"crop": True, "crop_style": "corner"}
    assert encoded(world.run(**one))["latents"][0] == 16, "the square ones are the same pixels, cropped or not"
    world.entries[0]["resolution"] = 80
    assert encoded(world.run(**one)) == {"captions": (0, 25), "latents": (24, 0)}, "another size: all"
    assert encoded(world.run(vae_dtype="bf16", **one)) == {"captions": (0, 25), "latents": (24, 0)}
    assert encoded(world.run(base_model_default_dtype="bf16", **one)) == {"captions": (25, 0), "latents": (0, 24)}


# --- validation (§7)

DRAW: dict[str, Any] = {
    "validation_disable": False,
    "validation_prompt": "red",
    "user_prompt_library": {"the sea": "blue sea"},
    "validation_resolution": "96x64, 64",
    "validation_num_inference_steps": 2,
    "validation_step_interval": 2,
}


@pytest.fixture(scope="module")
def drawn(shared: TinyWorld) -> Ran:
    return shared.run(output_dir="drawn", num_validation_images=2, **DRAW, **EMA)


def pixels(file: Path) -> bytes:
    return Image.open(file).convert("RGB").tobytes()


def test_file_names_and_sizes(drawn: Ran) -> None:
    names = {path.name for path in (drawn.output / "validation_images").iterdir()}
    plain = {
        f"{short}_{index}_{size}"
        for short in ("unconditional", "the_sea", "validation")
        for index in (0, 1)
        for size in ("96x64", "64x64")
    }
    assert names == {
        *(f"step_2_{name}{suffix}.png" for name in plain for suffix in ("", "_ema")),
        *(f"step_4_{name}.png" for name in plain),
    }
    base = drawn.output / "benchmarks/base_model"
    assert {path.name for path in base.glob("*.png")} == {f"{name}.png" for name in plain}
    for path in [*(drawn.output / "validation_images").glob("*.png"), *base.glob("*.png")]:
        width, height = path.stem.removesuffix("_ema").rsplit("_", 1)[1].split("x")
        assert Image.open(path).size == (int(width), int(height))


def test_an_image_says_how_it_was_made(drawn: Ran) -> None:
    text = Image.open(drawn.output / "validation_images/step_2_the_sea_1_96x64.png").text["simpletuner"]  # pyright: ignore
    facts = json.loads(text)
    assert facts.pop("weights") and facts == {
        "prompt": "blue sea", "negative_prompt": "blurry, cropped, ugly", "seed": 12, "steps": 2, "guidance": 3.0,
        "global_step": 2,
    }  # fmt: skip


def test_events_of_a_pass(drawn: Ran) -> None:
    images = [event for event in drawn.of_type("validation.image") if event["data"]["global_step"] == 2]
    assert len(images) == 24
    first = next(event for event in images if event["data"]["shortname"] == "the_sea")
    assert first["title"] == "Validation (step 2/2): the_sea" and first["body"] == "blue sea"
    assert first["data"]["resolution"] == [96, 64] and first["data"]["validation_type"] == "final"
    for event in images:
        assert (drawn.job.artifacts / event["images"][0]["artifact_id"]).exists()
    passes = [event["data"] for event in drawn.of_type("training.validation")]
    said = [(data["status"], data["step"], data["cause"]) for data in passes]
    assert said == [
        ("started", 0, "benchmark"), ("completed", 0, "benchmark"),
        ("started", 2, "interval"), ("completed", 2, "interval"),
        ("started", 4, "end"), ("completed", 4, "end"),
    ]  # fmt: skip


def test_the_same_pixels_twice_and_the_base_only_once(drawn: Ran, shared: TinyWorld) -> None:
    """A second run of equal seed draws equal images; what is on disk of this base is not drawn again."""
    base = {path: path.stat().st_mtime_ns for path in (drawn.output / "benchmarks").rglob("*.png")}
    again = shared.run(output_dir="drawn2", num_validation_images=2, **DRAW, **EMA)
    for path in drawn.output.rglob("*.png"):
        assert pixels(path) == pixels(again.output / path.relative_to(drawn.output)), path.name
    shared.run(output_dir="drawn", num_validation_images=2, resume_from_checkpoint="", **DRAW, **EMA)
    assert base == {path: path.stat().st_mtime_ns for path in base}


def test_validation_leaves_no_trace_in_training(drawn: Ran, shared: TinyWorld) -> None:
    silent = shared.run(output_dir="silent", **EMA)
    assert silent.metrics() == drawn.metrics()
    for name in ("rng-rank0.safetensors", "optimizer-rank0.safetensors"):
        left, right = (ran.output / "checkpoint-4" / name for ran in (silent, drawn))
        assert left.read_bytes() == right.read_bytes()


def test_the_exported_pipeline_draws_the_last_images(drawn: Ran) -> None:
    """§6.4: a whole diffusers pipeline with the averaged weights; anyone's diffusers draws the same pixels."""
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline

    folder = drawn.output / "pipeline"
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "blue sea",
        negative_prompt="blurry, cropped, ugly",
        width=96,
        height=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(12),
        use_resolution_binning=False,
    ).images[0]
    assert image.tobytes() == pixels(drawn.output / "validation_images/step_4_the_sea_1_96x64.png")
    averaged = drawn.weights(part="transformer_ema")
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, averaged[name]), name
    assert not list(drawn.output.glob(".pipeline*"))


def test_an_unconditional_pass_may_be_left_out(shared: TinyWorld) -> None:
    keys = DRAW | {"validation_disable_unconditional": True, "disable_benchmark": True, "user_prompt_library": ""}
    ran = shared.run(output_dir="conditional", **keys)
    assert {event["data"]["shortname"] for event in ran.of_type("validation.image")} == {"validation"}
    assert not (ran.output / "benchmarks").exists()


@pytest.mark.parametrize(("form", "name"), [("webp", "WEBP"), ("jpeg", "JPEG")])
def test_image_formats(shared: TinyWorld, form: str, name: str) -> None:
    ran = shared.run(output_dir=form, validation_image_format=form, **DRAW)
    files = list((ran.output / "validation_images").iterdir())
    assert files and {Image.open(file).format for file in files} == {name}
    assert {event["images"][0]["mime_type"] for event in ran.of_type("validation.image")} == {f"image/{form}"}


def test_a_startup_pass(shared: TinyWorld) -> None:
    ran = shared.run(output_dir="startup", validation_on_startup=True, disable_benchmark=True, **DRAW)
    causes = [(e["data"]["cause"], e["data"]["step"]) for e in ran.of_type("training.validation")]
    assert ("startup", 0) in causes


def test_held_out_loss(world: TinyWorld) -> None:
    held = {"id": "held", "dataset_type": "eval", "instance_data_dir": "held", "resolution": 64}
    from tiny_world import paint_pictures

    paint_pictures(world.root / "held", ((64, 64),))
    world.entries.append(held)
    ran = world.run(eval_steps_interval=2, eval_timesteps=3)
    rows = [(event["data"]["name"], event["data"]["step"]) for event in ran.of_type("training.metric")]
    assert rows == [("loss/val/held", 0), ("loss/val/held", 2), ("loss/val/held", 4)]
    again = world.run(eval_steps_interval=2, eval_timesteps=3, output_dir="again", seed=99, train_batch_size=4)
    first, second = (ran.of_type("training.metric")[0]["data"] for ran in (ran, again))
    assert first["value"] == pytest.approx(second["value"], rel=1e-5), "keyed by the sample: no seed, no batch"
    assert first["standard_error"] > 0


# --- events (§8.1)


def test_order_of_a_run(drawn: Ran, golden: Callable[[Path, str], None]) -> None:
    lines: list[str] = []
    for event in drawn.events:
        if event["type"] == "lifecycle.stage":
            line = f"stage {event['stage']['key']} {event['stage']['status']}"
            # A stage that takes longer than the time between two reports tells its progress in between.
            lines += [line] if lines[-1:] != [line] else []
        elif event["type"] not in ("training.progress", "validation.image"):
            code = event["data"].get("code") or event["data"].get("status") or ""
            lines.append(f"{event['type']} {code}".rstrip())
    golden(GOLDENS / "order.txt", "\n".join(lines) + "\n")


def test_percent_never_falls_and_one_status_ends_it(drawn: Ran) -> None:
    highest: dict[str, float] = {}
    for event in drawn.of_type("lifecycle.stage"):
        key, percent = event["stage"]["key"], event["stage"]["percent"]
        if event["stage"]["status"] == "running" and percent == 0:
            highest[key] = 0
        assert percent >= highest.get(key, 0)
        highest[key] = percent
    statuses = [event["data"]["status"] for event in drawn.of_type("training.status")]
    assert statuses == ["running", "completed"]
    assert drawn.events[-1]["type"] == "training.status"
    progress = [event["progress"]["current"] for event in drawn.of_type("training.progress")]
    assert progress == sorted(progress) and (progress[0], progress[-1]) == (1, 4)


# --- requests (§6.3)


@pytest.mark.parametrize(
    ("commands", "code", "status", "checkpoints"),
    [
        ((CommandName.STOP,), ExitCode.STOPPED, "stopped", 0),
        ((CommandName.CANCEL,), ExitCode.STOPPED, "cancelled", 0),
    ],
)
def test_an_end_before_the_first_step(
    shared: TinyWorld, commands: tuple[CommandName, ...], code: ExitCode, status: str, checkpoints: int
) -> None:
    job = shared.job(output_dir=f"early-{status}")
    for command in commands:
        job.send(command=_command(command))
    ran = shared.main(job)
    assert ran.code == code
    assert [event["data"]["status"] for event in ran.of_type("training.status")] == [status]
    assert len(list(ran.output.glob("checkpoint-*"))) == checkpoints
    keys = [event["stage"]["key"] for event in ran.of_type("lifecycle.stage")]
    assert keys[-1] == "training_abort"


def _command(name: CommandName) -> Any:
    from simpletuner.job import Command

    return Command(command=name)


def test_requests_wait_for_the_first_step_and_are_answered_once(shared: TinyWorld) -> None:
    ran = shared.run(
        CommandName.VALIDATE, CommandName.CHECKPOINT, output_dir="asked", gradient_accumulation_steps=2,
        **DRAW | {"validation_step_interval": 0},
    )  # fmt: skip
    saved = [(e["checkpoint"]["step"], e.get("request_id")) for e in ran.of_type("training.checkpoint")]
    assert saved == [(1, "checkpoint"), (4, None)]
    asked = [e["data"]["status"] for e in ran.of_type("training.validation") if e.get("request_id") == "validate"]
    assert asked == ["started", "completed"]
    assert {e["data"]["step"] for e in ran.of_type("training.validation") if e.get("request_id")} == {1}


def test_a_validation_that_cannot_be_is_skipped_by_name(shared: TinyWorld) -> None:
    ran = shared.run(CommandName.VALIDATE, output_dir="asked2")
    said = [(e["data"]["status"], e.get("request_id")) for e in ran.of_type("training.validation")]
    assert said == [("skipped", "validate")]
