"""What a checkpoint costs: how long the step waits for it, and its bytes per second against a plain file of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.bench.figure import Figure, Measured, ratio_at_most
from simpletuner.bench.scene import BATCH_SIZE, Scene
from simpletuner.bench.trainer import TrainerLoop
from simpletuner.checkpoints import find_faults
from simpletuner.train.build import Built
from simpletuner.train.checkpoint import read_point
from simpletuner.train.requests import Requests

ROUNDS = 10
STEPS = 10
MOST_STEPS = 3.0
"""training.md §10.2; the goal is 1."""


def measure(scene: Scene, rounds: int = ROUNDS, steps: int = STEPS) -> Measured:
    """In each round some steps, a save, a plain write of its tensors, a resume, a plain read of them."""
    step_s: list[float] = []
    stall_s: list[float] = []
    save_s: list[float] = []
    write_s: list[float] = []
    resume_s: list[float] = []
    read_s: list[float] = []
    num_bytes = 0
    with scene.run("bf16", "checkpoint", checkpoints_total_limit=2) as built:
        trainer = TrainerLoop(built.run)
        built.metrics.start()
        trainer.run(steps)
        for number in range(rounds):
            step_s.append(statistics.median(trainer.run(steps)))
            stall_s.append(_seconds(lambda: built.inspection.checkpoint(built.run.state, Requests())))
            save_s.append(stall_s[-1] + _seconds(built.inspection.saver.wait))
            folder = _latest(built)
            num_bytes = sum(path.stat().st_size for path in folder.glob("**/*.safetensors"))
            tensors = tensors_of(folder)
            plain = scene.root / f"plain-{number}"
            plain.mkdir()
            write_s.append(_seconds(lambda tensors=tensors, plain=plain: write_plain(tensors, plain)))
            resume_s.append(_seconds(lambda folder=folder: _resume(built, folder)))
            read_s.append(_seconds(lambda plain=plain: _read(plain)))
    return Measured(
        benchmark="checkpoint",
        figures=[
            _stall(stall_s, step_s),
            _throughput("save, bytes per s ÷ plain save_file and fsync", save_s, write_s, num_bytes),
            _throughput("resume with verification, bytes per s ÷ plain load_file", resume_s, read_s, num_bytes),
        ],
    )


def _seconds(work: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    work()
    return time.perf_counter() - started_at


def _latest(built: Built) -> Path:
    folder = built.inspection.saver.latest
    assert folder is not None and folder.name == f"checkpoint-{built.run.state.step}"
    return folder


def tensors_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By file, in memory of their own."""
    return {
        "-".join(path.relative_to(folder).parts): {name: tensor.clone() for name, tensor in load_file(path).items()}
        for path in sorted(folder.glob("**/*.safetensors"))
    }


def write_plain(tensors: dict[str, dict[str, Tensor]], folder: Path) -> None:
    for name, named in tensors.items():
        save_file(named, folder / name)
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _resume(built: Built, folder: Path) -> None:
    """As a start does: every byte is verified, then weights, optimizer and generators are put back."""
    assert not find_faults(folder)
    built.resume(read_point(folder))


def _read(folder: Path) -> None:
    for path in folder.iterdir():
        for tensor in load_file(path).values():
            tensor.clone()  # a mapped file is read when it is touched


def _stall(stall_s: list[float], step_s: list[float]) -> Figure:
    ratios = [stall / step for stall, step in zip(stall_s, step_s, strict=True)]
    note = (
        f"copied while the step waits, written beside it: {1e3 * statistics.median(stall_s):.1f} ms, "
        f"a step of batch {BATCH_SIZE} {1e3 * statistics.median(step_s):.0f} ms; goal 1"
    )
    return ratio_at_most("stall of a save ÷ a step", ratios, MOST_STEPS, note)


def _throughput(name: str, ours_s: list[float], plain_s: list[float], num_bytes: int) -> Figure:
    ratios = [plain / ours for ours, plain in zip(ours_s, plain_s, strict=True)]
    ours, plain = (num_bytes / statistics.median(times) / 1e6 for times in (ours_s, plain_s))
    return Figure(
        name=name,
        value=statistics.median(ratios),
        unit="",
        least=min(ratios),
        most=max(ratios),
        note=f"{ours:.0f} and {plain:.0f} MB/s of {num_bytes / 1e6:.1f} MB, medians of {len(ours_s)}",
    )
