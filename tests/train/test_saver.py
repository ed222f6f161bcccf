"""A checkpoint that is written beside training is the one of its step, and costs the step a copy only."""

from __future__ import annotations

import filecmp
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import TinyWorld, at_each_backward

from simpletuner.checkpoints import CheckpointFolder, complete_checkpoint, find_faults
from simpletuner.errors import ExitCode
from simpletuner.train import saver
from simpletuner.train.host_copies import HostCopies

KINDS: dict[str, dict[str, Any]] = {
    "full": {"use_ema": True},
    "averaging": {"optimizer": "adamw_schedulefree"},
    "lora": {"model_type": "lora", "use_ema": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_copied_or_not_the_files_are_equal(
    shared: TinyWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Two saves, so that the memory of the first copies is used again."""
    options = KINDS[kind] | {"checkpoint_step_interval": 2, "max_train_steps": 5}
    beside = shared.run(output_dir=str(tmp_path / "beside"), **options)
    monkeypatch.setattr(saver, "_ON_A_CPU", 0)
    at_once = shared.run(output_dir=str(tmp_path / "at-once"), **options)
    compared = 0
    for step in (2, 4):
        one, other = (ran.output / f"checkpoint-{step}" for ran in (beside, at_once))
        files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
        assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
        assert all(filecmp.cmp(one / file, other / file, shallow=False) for file in files)
        compared += len(files)
    assert compared >= 6


def test_training_goes_on_while_a_checkpoint_is_written(shared: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first save ends only once the step after it is being computed; what it holds is of its own step."""
    went_on = threading.Event()

    def slow(folder: Path, output_dir: Path, step: int) -> CheckpointFolder:
        assert step != 2 or went_on.wait(60), "training waits for the save"
        return complete_checkpoint(folder, output_dir, step)

    def see(count: int, loss: torch.Tensor) -> torch.Tensor:
        if count == 4:
            went_on.set()
        return loss

    plain = shared.run(output_dir="at-ease", checkpoint_step_interval=2, max_train_steps=5)
    monkeypatch.setattr(saver, "complete_checkpoint", slow)
    with at_each_backward(see):
        ran = shared.run(output_dir="hurried", checkpoint_step_interval=2, max_train_steps=5)
    assert went_on.is_set()
    assert ran.losses() == plain.losses()
    for name, tensor in plain.weights(2).items():
        assert torch.equal(ran.weights(2)[name], tensor)
    steps = [event["checkpoint"]["step"] for event in ran.of_type("training.checkpoint")]
    assert steps == [2, 4, 5]
    stages = [event["stage"]["status"] for event in ran.of_type("lifecycle.stage")
              if event["stage"]["key"] == "checkpoint_save"]  # fmt: skip
    assert stages == ["running", "completed"] * 3


def test_a_run_that_fails_still_has_what_was_being_saved(shared: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def slow(folder: Path, output_dir: Path, step: int) -> CheckpointFolder:
        failed.wait(60)
        return complete_checkpoint(folder, output_dir, step)

    def fail(count: int, loss: torch.Tensor) -> torch.Tensor:
        if count == 3:
            failed.set()
            raise MemoryError
        return loss

    monkeypatch.setattr(saver, "complete_checkpoint", slow)
    with at_each_backward(fail):
        ran = shared.main(shared.job(output_dir="cut-short", checkpoint_step_interval=2, max_train_steps=5))
    assert ran.code == ExitCode.OUT_OF_MEMORY
    assert not find_faults(ran.output / "checkpoint-2")


def test_copies_use_their_memory_again() -> None:
    copies = HostCopies()
    tensor = torch.arange(6.0)
    with copies.making():
        first = copies.keep("a", tensor)
        tensor += 1
        assert copies.keep("a", tensor) is first, "kept once in one making"
    assert torch.equal(first, torch.arange(6.0))
    with copies.making():
        again = copies.keep("a", tensor)
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, torch.arange(6.0) + 1)
    assert copies.num_bytes == 24
    with copies.making():
        assert copies.keep("a", tensor[:2]).shape == (2,)
