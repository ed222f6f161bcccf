"""What the trainer costs beyond a hand-written loop: a ratio of times, and counts that no clock disturbs."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simpletuner.bench import launches
from simpletuner.bench.bare import BareLoop
from simpletuner.bench.counters import HOST_SYNCS, CallCounter, OperationCounter, is_network
from simpletuner.bench.figure import Figure, Measured, ratio_at_most
from simpletuner.bench.scene import BATCH_SIZE, PRECISIONS, Precision, Scene
from simpletuner.bench.trainer import TrainerLoop
from simpletuner.data.loader import Batch
from simpletuner.train.build import Built
from simpletuner.train.loop import Run, train

BLOCK = 10
WARM_UP = 5
MAX_RATIO, MAX_OPERATIONS, MAX_CALLS = 1.05, 25, 120
"""training.md §10.1, §10.2."""

Counts = Counter[tuple[str, str]]


def measure(scene: Scene, steps: int) -> Measured:
    """`steps` of each loop in each precision, in alternating blocks; then one step counted."""
    found = Measured(benchmark="overhead", figures=launches.figures())
    for precision in PRECISIONS:
        with scene.run(precision) as built:
            bare, trainer = _bare(built), TrainerLoop(built.run)
            built.metrics.start()
            found.figures += _times(bare, trainer, built.run, precision, steps)
            figures, details = _counts(bare, trainer, built, precision)
            found.figures += figures
            found.details[precision] = details
    return found


def _bare(built: Built) -> BareLoop:
    run = built.run
    assert run.autocast is None, "the bare loop computes in the type of the weights"
    batch: Batch = next(run.batches)
    visits = list(zip(batch.samples, batch.visits, strict=True))
    noised = run.objective.draw(batch.latents_BCHW, visits, step=0, first=0)
    return BareLoop(run.family, run.denoiser, run.update, batch, noised)


def _times(bare: BareLoop, trainer: TrainerLoop, run: Run, precision: Precision, steps: int) -> Iterator[Figure]:
    bare.run(run.state.step, WARM_UP)
    trainer.run(WARM_UP)
    blocks = [min(BLOCK, steps - start) for start in range(0, steps, BLOCK)]
    bare_s: list[list[float]] = []
    trainer_s: list[list[float]] = []
    for number, size in enumerate(blocks):
        # Bare first, then trainer first: what drifts meets both alike.
        if number % 2 == 0:
            bare_s.append(bare.run(run.state.step, size))
        trainer_s.append(trainer.run(size))
        if number % 2 == 1:
            bare_s.append(bare.run(run.state.step, size))
    slow, fast = _median(trainer_s), _median(bare_s)
    pairs = [statistics.median(a) / statistics.median(b) for a, b in zip(trainer_s, bare_s, strict=True)]
    name, note = f"{precision}: trainer ÷ bare, medians of steps", f"{steps} steps each, batch {BATCH_SIZE}"
    yield ratio_at_most(name, pairs, MAX_RATIO, note, value=slow / fast)
    yield _step(f"{precision}: bare step", bare_s, "")
    yield _step(f"{precision}: trainer step", trainer_s, f"{(slow - fast) * 1e6:.0f} µs more")


def _median(blocks: list[list[float]]) -> float:
    return statistics.median(time for block in blocks for time in block)


def _step(name: str, blocks: list[list[float]], note: str) -> Figure:
    times = [time * 1e3 for block in blocks for time in block]
    middle = statistics.median(times)
    return Figure(name=name, value=middle, unit="ms", least=min(times), most=max(times), note=note)


def _counts(
    bare: BareLoop, trainer: TrainerLoop, built: Built, precision: Precision
) -> tuple[list[Figure], dict[str, Any]]:
    operations = OperationCounter(train.__code__)
    _quiet_step(trainer, built, operations)
    calls = CallCounter(train.__code__)
    _quiet_step(trainer, built, calls)
    by_hand = OperationCounter(BareLoop.run.__code__)
    bare.run(built.run.state.step, 1, before=by_hand.start, after=by_hand.stop)
    own = _sum(operations.counts, network=False)
    syncs = sum(count for (_, name), count in operations.counts.items() if name in HOST_SYNCS)
    of_network = _sum(operations.counts, network=True)
    of_bare = by_hand.counts.total()
    num_calls = calls.counts.total()
    figures = [
        Figure(
            name=f"{precision}: host synchronisations in a quiet step",
            value=syncs,
            unit="",
            limit="0",
            is_met=syncs == 0,
        ),
        Figure(
            name=f"{precision}: torch operations outside forward, backward, optimizer",
            value=own,
            unit="",
            limit=f"≤ {MAX_OPERATIONS}",
            is_met=own <= MAX_OPERATIONS,
            note=f"in them {of_network}, in the bare step {of_bare}",
        ),
        Figure(
            name=f"{precision}: Python calls in our packages, quiet step",
            value=num_calls,
            unit="",
            limit=f"≤ {MAX_CALLS}",
            is_met=num_calls <= MAX_CALLS,
            note="main thread",
        ),
    ]
    details = {
        "operations": _listed(operations.counts),
        "operations_bare": _listed(by_hand.counts),
        "calls": _listed(calls.counts),
    }
    return figures, details


def _quiet_step(trainer: TrainerLoop, built: Built, counter: OperationCounter | CallCounter) -> None:
    """Counts one step that reports nothing: a report is made just before, and none is due for the time that passes."""
    built.metrics.report_interval_s = math.inf
    file: Path = built.inspection.output_dir / "training_metrics.jsonl"
    trainer.run(1)
    built.metrics.drain()
    size = file.stat().st_size
    trainer.run(1, before=counter.start, after=counter.stop)
    assert file.stat().st_size == size


def _sum(counts: Counts, *, network: bool) -> int:
    return sum(count for (caller, _), count in counts.items() if is_network(caller) == network)


def _listed(counts: Counts) -> dict[str, dict[str, int]]:
    listed: dict[str, dict[str, int]] = {}
    for (caller, name), count in sorted(counts.items()):
        listed.setdefault(caller, {})[name] = count
    return listed
