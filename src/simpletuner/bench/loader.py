"""How long a step waits for its batch, when the batch before it kept the trainer busy for a while."""

from __future__ import annotations

import statistics
import time

from simpletuner.bench.figure import Figure, Measured
from simpletuner.bench.scene import BATCH_SIZE, Scene

STEP_S = 0.020
MAX_SHARE = 0.02
"""training.md §10.2."""


def measure(scene: Scene, steps: int) -> Measured:
    """`steps` steps of 20 ms; sleeping stands for the step, as a step on a GPU leaves the interpreter alone."""
    waits: list[float] = []
    with scene.run("bf16") as built:
        started_at = time.perf_counter()
        next(built.run.batches)
        first_s = time.perf_counter() - started_at
        for _ in range(steps):
            time.sleep(STEP_S)
            asked_at = time.perf_counter()
            next(built.run.batches)
            waits.append(time.perf_counter() - asked_at)
    share = sum(waits) / (sum(waits) + steps * STEP_S)
    figures = [
        Figure(
            name="share of time blocked, 20 ms steps",
            value=100 * share,
            unit="%",
            limit=f"≤ {100 * MAX_SHARE:.0f} %",
            is_met=share <= MAX_SHARE,
            note=f"{steps} steps, batch {BATCH_SIZE}, local disk",
        ),
        Figure(
            name="wait for a batch, median",
            value=statistics.median(waits) * 1e6,
            unit="µs",
            least=min(waits) * 1e6,
            most=max(waits) * 1e6,
            note=f"the very first {first_s * 1e3:.1f} ms, not counted",
        ),
    ]
    return Measured(benchmark="loader", figures=figures)
