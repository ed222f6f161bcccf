"""Trackers for real: what their own readers find in the files that a run has left. training.md §2.9."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_world import Ran, TinyWorld

from simpletuner.errors import ExitCode

RUN: dict[str, Any] = {
    "tracker_project_name": "tiny",
    "tracker_run_name": "mine",
    "max_train_steps": 3,
    "validation_disable": False,
    "validation_prompt": "red",
    "validation_resolution": 64,
    "validation_num_inference_steps": 1,
    "validation_step_interval": 2,
    "eval_timesteps": 2,
    "disable_benchmark": True,
}


@pytest.fixture
def measured(shared: TinyWorld) -> Iterator[TinyWorld]:
    """With a held-out set."""
    if not (shared.root / "held").exists():
        shutil.copytree(shared.pictures, shared.root / "held")
    shared.entries.append({"id": "held", "dataset_type": "eval", "instance_data_dir": "held", "resolution": 64})
    yield shared
    shared.entries.pop()


def held_out(ran: Ran) -> list[tuple[int, float]]:
    return [(event["data"]["step"], event["data"]["value"]) for event in ran.of_type("training.metric")]


def test_tensorboard(measured: TinyWorld) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ran = measured.run(output_dir="board", report_to="tensorboard", **RUN)
    assert ran.code is ExitCode.DONE and ran.notices("tracker_failed") == []
    found = EventAccumulator(str(ran.output / "tensorboard/mine"))
    found.Reload()
    losses = [(row.step, row.value) for row in found.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in enumerate(ran.losses(), 1)]
    assert [(row.step, row.value) for row in found.Scalars("loss/val/held")] == [
        (step, pytest.approx(value)) for step, value in held_out(ran)
    ]
    assert [step for step, _ in held_out(ran)] == [0, 2, 3]
    name = "validation/validation_0_64x64"
    assert [row.step for row in found.Images(name)] == [2, 3]
    shown = Image.open(io.BytesIO(found.Images(name)[-1].encoded_image_string))
    kept = Image.open(ran.output / "validation_images/step_3_validation_0_64x64.png")
    assert shown.tobytes() == kept.tobytes()


def read_wandb(file: Path) -> Iterator[bytes]:
    """Records of the library's offline file: LevelDB's log format, after a header of 7 bytes."""
    content, place, parts = file.read_bytes(), 7, b""
    while place < len(content):
        if (left := -place % 32768) and left < 7:  # no room for a header: the rest of the block is empty
            place += left
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_wandb_offline(measured: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    ran = measured.run(output_dir="wandb", report_to="wandb", **RUN)
    assert ran.code is ExitCode.DONE and ran.notices("tracker_failed") == []
    (file,) = (ran.output / "wandb").glob("offline-run-*/run-*.wandb")
    records = [Record.FromString(content) for content in read_wandb(file)]
    assert {(row.run.project, row.run.display_name) for row in records if row.HasField("run")} == {("tiny", "mine")}
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.history.item
    ]
    losses = [(row["_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(step, pytest.approx(loss)) for step, loss in enumerate(ran.losses(), 1)]
    assert [(row["_step"], row["loss/val/held"]) for row in rows if "loss/val/held" in row] == held_out(ran)
    (image,) = file.parent.glob("files/media/images/validation/validation_0_64x64_3_*.png")
    kept = Image.open(ran.output / "validation_images/step_3_validation_0_64x64.png")
    assert Image.open(image).convert("RGB").tobytes() == kept.tobytes()


@pytest.mark.parametrize("missing", [True, False])
def test_one_that_fails_is_named_once(shared: TinyWorld, monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    """Not installed, or without a place to write."""
    output = f"tracker-{missing}"
    if missing:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    else:
        pytest.importorskip("tensorboard")
        (shared.root / output).mkdir()
        (shared.root / output / "tensorboard").touch()
    ran = shared.run(output_dir=output, report_to="tensorboard")
    assert ran.code is ExitCode.DONE and len(ran.losses()) == 4
    (notice,) = ran.notices("tracker_failed")
    assert notice["severity"] == "warning" and "tensorboard" in notice["message"]
