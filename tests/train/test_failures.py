"""What a person is told when something is wrong. training.md §9; acceptance 54, 55, 57."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import Ran, TinyWorld

from simpletuner.checkpoints import find_faults
from simpletuner.errors import ExitCode, UserError
from simpletuner.train.__main__ import main

Break = Callable[[TinyWorld], dict[str, Any] | None]


def textfile(world: TinyWorld) -> None:
    world.entries[0]["caption_strategy"] = "textfile"
    for picture in world.pictures.glob("*.png"):
        picture.with_suffix(".txt").write_text(picture.stem)


def no_usable_picture(world: TinyWorld) -> None:
    shutil.rmtree(world.pictures)
    world.pictures.mkdir()
    (world.pictures / "readme.md").write_text("no picture")


def all_too_small(world: TinyWorld) -> None:
    world.entries[0]["minimum_image_size"] = 4096


def truncated_picture(world: TinyWorld) -> None:
    file = next(world.pictures.glob("*.png"))
    file.write_bytes(file.read_bytes()[:-60])


def caption_missing(world: TinyWorld) -> None:
    textfile(world)
    next(world.pictures.glob("*.txt")).unlink()


def caption_not_utf8(world: TinyWorld) -> None:
    textfile(world)
    next(world.pictures.glob("*.txt")).write_bytes(b"\xff\xfe\x00")


def no_full_batch(world: TinyWorld) -> dict[str, Any]:
    return {"max_train_steps": 0, "num_train_epochs": 1, "train_batch_size": 64}


def model_part_missing(world: TinyWorld) -> dict[str, Any]:
    broken = Path(shutil.copytree(world.model, world.root / "model"))
    shutil.rmtree(broken / "vae")
    return {"pretrained_model_name_or_path": str(broken)}


def hub_unavailable(world: TinyWorld) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": "nobody/nothing-of-the-kind"}


def unknown_checkpoint(world: TinyWorld) -> dict[str, Any]:
    return {"resume_from_checkpoint": "checkpoint-77"}


TABLE: list[tuple[Break, str, ExitCode]] = [
    (no_usable_picture, "dataset_empty", ExitCode.DATA),
    (all_too_small, "dataset_empty", ExitCode.DATA),
    (truncated_picture, "data_defects", ExitCode.DATA),
    (caption_missing, "data_defects", ExitCode.DATA),
    (caption_not_utf8, "data_defects", ExitCode.DATA),
    (no_full_batch, "no_full_batch", ExitCode.CONFIG),
    (model_part_missing, "model_part_missing", ExitCode.OUTSIDE),
    (hub_unavailable, "hub_unavailable", ExitCode.OUTSIDE),
    (unknown_checkpoint, "checkpoint_not_found", ExitCode.CONFIG),
]


@pytest.mark.parametrize(("damage", "code", "exit_code"), TABLE, ids=[row[0].__name__ for row in TABLE])
def test_a_mistake_has_a_code_and_an_exit_code(world: TinyWorld, damage: Break, code: str, exit_code: ExitCode) -> None:
    options = damage(world) or {}
    with pytest.raises(UserError) as caught:
        world.run(**options)
    assert (caught.value.code, caught.value.exit_code) == (code, exit_code)
    assert caught.value.hint


def test_a_missing_folder_is_found_before_the_start(world: TinyWorld) -> None:
    shutil.rmtree(world.pictures)
    assert [problem.code for problem in world.resolve().errors] == ["dataset_path_missing"]


def test_the_process_ends_with_its_error_as_the_last_line(world: TinyWorld) -> None:
    no_usable_picture(world)
    ran = world.spawn(world.job())
    assert ran.code == 65
    *_, status, error = ran.events
    assert (status["type"], status["data"]["status"], status["data"]["exit_code"]) == ("training.status", "failed", 65)
    assert (error["type"], error["data"]["code"], error["data"]["exit_code"]) == ("error", "dataset_empty", 65)
    assert error["data"]["stage"] == "init_data_backend"
    stages = [(e["stage"]["key"], e["stage"]["status"]) for e in ran.of_type("lifecycle.stage")]
    assert stages[-3:] == [
        ("init_data_backend", "failed"), ("training_abort", "running"), ("training_abort", "completed"),
    ]  # fmt: skip


# --- numbers that are none, and bugs: injected where the arithmetic is


def poisoned(world: TinyWorld, when: Callable[[int], bool], **options: Any) -> Ran:
    return world.main(world.job(**options), lambda count, loss: loss * math.nan if when(count) else loss)


def test_one_step_that_is_no_number_is_skipped(shared: TinyWorld) -> None:
    ran = poisoned(shared, lambda count: count == 2, output_dir="nan-once", max_train_steps=4)
    assert ran.code == 0
    notice = ran.notices("nonfinite_step")
    assert len(notice) == 1 and notice[0]["data"]["step"] == 2 and len(notice[0]["data"]["samples"]) == 2
    assert notice[0]["data"]["samples"][0] in notice[0]["message"]
    assert all(value.isfinite().all() for value in ran.weights().values())


def test_numbers_that_are_none_to_the_end(shared: TinyWorld) -> None:
    options = {"checkpoint_step_interval": 2, "max_train_steps": 9}
    ran = poisoned(shared, lambda count: count > 2, output_dir="nan-always", **options)
    assert ran.code == 72
    assert ran.events[-1]["data"]["code"] == "diverged" and ran.events[-1]["data"]["exit_code"] == 72
    status = ran.of_type("training.status")[-1]["data"]
    assert status["status"] == "failed" and status["global_step"] >= 2 and status["total_num_steps"] == 9
    for folder in ran.output.glob("checkpoint-*"):
        assert find_faults(folder) == []
        step = int(folder.name.removeprefix("checkpoint-"))
        assert all(value.isfinite().all() for value in ran.weights(step).values())
    assert (ran.output / "checkpoint-2").exists()


def test_a_bug_keeps_its_traceback(shared: TinyWorld) -> None:
    def break_down(_count: int, _loss: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("of the test")

    ran = shared.main(shared.job(output_dir="bug"), break_down)
    assert ran.code == 70
    error = ran.events[-1]["data"]
    assert error["code"] == "bug" and "ZeroDivisionError: of the test" in error["traceback"]
    assert "simpletuner/train/loop.py" in error["traceback"]


FULL = """
import resource, signal, os, time
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch
plain = torch.Tensor.backward
count = [0]
def backward(*args, **keys):
    plain(*args, **keys)
    count[0] += type(args[0]).__name__ != "FakeTensor"  # the rehearsal's
    while count[0] == 3 and {first!r} and not os.path.isdir({first!r}):
        time.sleep(0.01)  # the first save is beside training
    limit = {limit} if count[0] > 2 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
torch.Tensor.backward = backward
"""


def test_no_room_for_a_checkpoint(shared: TinyWorld) -> None:
    """The first failure costs one save, the second in a row the run; what was whole stays whole (73)."""
    options = {"checkpoint_step_interval": 2, "max_train_steps": 8}
    ran = shared.spawn(
        shared.job(output_dir="full", **options),
        before=FULL.format(limit=20_000, first=str(shared.root / "full/checkpoint-2")),
    )
    assert ran.code == 73, ran.events[-1]
    assert ran.events[-1]["data"]["code"] == "disk_full"
    assert len(ran.notices("checkpoint_failed")) == 1
    saves = [e["stage"]["status"] for e in ran.of_type("lifecycle.stage") if e["stage"]["key"] == "checkpoint_save"]
    assert saves == ["running", "completed", "running", "failed", "running", "failed"]
    assert [path.name for path in ran.output.iterdir() if path.is_dir()] == ["checkpoint-2"]
    assert find_faults(ran.output / "checkpoint-2") == []


def test_no_room_for_the_journal(shared: TinyWorld, capfd: pytest.CaptureFixture[str]) -> None:
    """What cannot be told there is told by the exit code and in the log."""
    job = shared.job(output_dir="untold")
    job.journal_path.symlink_to("/dev/full")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert main(str(job.root)) == 73
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "disk_full" in capfd.readouterr().err


def test_a_damaged_cache_entry_is_made_anew(world: TinyWorld) -> None:
    one = {"max_train_steps": 2, "resume_from_checkpoint": ""}
    whole = world.run(**one)
    shard = next((world.root / "cache").rglob("vae/**/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(bytes(content))
    again = world.run(**one)
    assert len(again.notices("cache_entry_rebuilt")) == 1
    assert again.losses() == whole.losses()


def test_a_validation_that_fails_is_an_event(shared: TinyWorld) -> None:
    """The run goes on, and the base images count as not drawn."""
    draw = {"validation_disable": False, "validation_prompt": "red", "validation_resolution": 64}
    output = shared.root / "unwritable"
    output.mkdir()
    (output / "validation_images").write_text("in the way")
    (output / "benchmarks").write_text("in the way")
    ran = shared.run(output_dir="unwritable", validation_step_interval=2, validation_num_inference_steps=2, **draw)
    assert ran.code is ExitCode.DONE
    said = [(e["data"]["status"], e["data"]["step"]) for e in ran.of_type("training.validation")]
    assert said == [(status, step) for step in (0, 2, 4) for status in ("started", "failed")]
    assert all(e["data"].get("reason") for e in ran.of_type("training.validation") if e["data"]["status"] == "failed")
    assert json.loads((ran.output / "training_metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
