"""A dataset of a million pictures: time to the first batch, memory of a row, a step; and a long event log."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from simpletuner.bench.figure import Figure, Measured, quantile, ratio_at_most
from simpletuner.bench.scene import BATCH_SIZE, Scene
from simpletuner.config.dataset_options import PictureDataset
from simpletuner.data.backends import open_backend
from simpletuner.data.cache import CacheStore
from simpletuner.data.loader import BatchReader, LatentSource, TextSource
from simpletuner.data.manifest import CaptionColumn, Manifest
from simpletuner.data.plan import EpochPlan, Position
from simpletuner.data.text_column import TextColumn

ROWS = 1_000_000
FEW_ROWS = 10_000
POLLS = 1000
PAIRS, STEPS = 40, 100
MOST_ROW_BYTES = 200
MAX_RATIO = 1.05
MOST_POLL_MS = 5.0
_EVENT_LOG = "simpletuner.bench.event_log"
_TARGETS = ((64, 64), (72, 56), (56, 72), (80, 48), (48, 80), (88, 48), (48, 88), (96, 40), (40, 96), (64, 56))
_SEED = 1
T = TypeVar("T")


def measure(scene: Scene, rows: int = ROWS, polls: int = POLLS) -> Measured:
    (dataset,) = scene.config().image_datasets
    many, bytes_per_row = _weighed(lambda: synthetic_manifest(dataset, rows, scene.root), rows)
    few = synthetic_manifest(dataset, min(rows, FEW_ROWS), scene.root)
    return Measured(
        benchmark="scale",
        figures=[
            *_start_figures(many),
            _memory_figure(bytes_per_row, many),
            _step_figure(many, few, scene.root),
            *_poll_figures(scene.root, rows, polls),
        ],
    )


def synthetic_manifest(dataset: PictureDataset, rows: int, cache_dir: Path) -> Manifest:
    """`rows` kept pictures in ten buckets, each with a path and a caption of its own; no file exists."""
    numbers = np.arange(rows)
    targets = np.asarray(_TARGETS, np.int32)[numbers % len(_TARGETS)]
    geometry = np.zeros((rows, 8), np.int32)
    geometry[:, 0:2] = geometry[:, 2:4] = geometry[:, 6:8] = targets
    contents = np.zeros((rows, 32), np.uint8)
    contents[:, :8] = numbers.astype("<u8").view(np.uint8).reshape(rows, 8)
    return Manifest(
        dataset=dataset,
        backend=open_backend(dataset, cache_dir),
        paths=TextColumn(f"{number // 1000:04}/{number:08}.jpg" for number in range(rows)),
        num_bytes=np.full(rows, 250_000, np.int64),
        reasons=[None] * rows,
        details={},
        geometry=geometry,
        scales=np.ones((rows, 2)),
        contents=contents,
        captions=CaptionColumn(
            texts=TextColumn(f"a photograph of the thing with number {number}" for number in range(rows)),
            starts=np.arange(rows + 1),
            ids=np.arange(rows, dtype=np.int32),
        ),
    )


def _plan(manifest: Manifest) -> EpochPlan:
    return EpochPlan([manifest.planned_set()], seed=_SEED, batch_size=BATCH_SIZE)


def _weighed(build: Callable[[], Manifest], rows: int) -> tuple[Manifest, float]:
    """With the plan over it, after its first batch of every bucket; bytes of Python's and numpy's allocators."""
    tracemalloc.start()
    try:
        manifest = build()
        plan = _plan(manifest)
        for _ in islice(plan.walk(), 10 * len(_TARGETS)):
            pass
        return manifest, tracemalloc.get_traced_memory()[0] / rows
    finally:
        tracemalloc.stop()


def _start_figures(manifest: Manifest) -> Iterator[Figure]:
    plan, planned_s = _timed(lambda: _plan(manifest))
    _, first_s = _timed(lambda: next(plan.walk()))
    again = _plan(manifest)
    middle = again.groups_in_epoch(0) // 2
    group, resumed_s = _timed(lambda: next(again.walk(Position(0, middle))))
    assert group.position == Position(0, middle)
    note = f"{len(manifest):,} rows, batch {BATCH_SIZE}"
    yield Figure(
        name="rows → epoch plan and the samples of its first batch",
        value=planned_s + first_s,
        unit="s",
        note=f"{note}; the plan alone {planned_s:.2f} s",
    )
    yield Figure(
        name="plan → samples of the batch in the middle of an epoch",
        value=resumed_s,
        unit="s",
        note=f"{note}; {middle:,} groups are walked past",
    )


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started_at = time.perf_counter()
    return work(), time.perf_counter() - started_at


def _memory_figure(bytes_per_row: float, manifest: Manifest) -> Figure:
    columns = (manifest.num_bytes, manifest.geometry, manifest.scales, manifest.contents, manifest.kept)
    rows = len(manifest)
    names, captions = (column.nbytes / rows for column in (manifest.paths, manifest.captions.texts))
    return Figure(
        name="memory of a row: manifest and epoch plan",
        value=bytes_per_row,
        unit="B",
        limit=f"≤ {MOST_ROW_BYTES} B",
        is_met=bytes_per_row <= MOST_ROW_BYTES,
        note=f"{sum(column.nbytes for column in columns) / rows:.0f} B columns, {names:.0f} B path, "
        f"{captions:.0f} B caption, all distinct",
    )


def _step_figure(many: Manifest, few: Manifest, folder: Path) -> Figure:
    """The next group, and its names and captions: all of a batch but its tensors, which are cache reads."""
    of_many, of_few = (_Stepper(manifest, folder) for manifest in (many, few))
    pairs: list[tuple[float, float]] = []
    for number in range(PAIRS):
        # Few first, then many first: what drifts meets both alike.
        first, second = (of_few, of_many) if number % 2 else (of_many, of_few)
        one, other = first.block(), second.block()
        pairs.append((other, one) if number % 2 else (one, other))
    ratios = [slow / fast for slow, fast in pairs]
    many_us, few_us = (1e6 * statistics.median(times) for times in zip(*pairs, strict=True))
    name = f"next batch of the plan with names and captions, {len(many):,} ÷ {len(few):,} rows"
    note = f"{many_us:.0f} and {few_us:.0f} µs, medians; {PAIRS} pairs of {STEPS}"
    return ratio_at_most(name, ratios, MAX_RATIO, note)


class _Stepper:
    def __init__(self, manifest: Manifest, folder: Path) -> None:
        store = CacheStore(folder / "bench-cache-none")
        source = LatentSource(manifest, store, "")
        self._reader = BatchReader({manifest.dataset.id: source}, TextSource(store, ""), seed=_SEED)
        self._groups = _plan(manifest).walk()
        self.block()

    def block(self) -> float:
        """Median seconds of a step: the few that shuffle a bucket anew are left out."""
        return statistics.median(_timed(self._step)[1] for _ in range(STEPS))

    def _step(self) -> None:
        group = next(self._groups)
        self._reader.members(group, group.entries)


def _poll_figures(folder: Path, rows: int, polls: int) -> Iterator[Figure]:
    words = [sys.executable, "-m", _EVENT_LOG, str(folder), str(rows), str(polls)]
    ran = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    told: dict[str, list[float]] = json.loads(ran.stdout)
    for kind, times in told.items():
        slow, middle = quantile(times, 0.99), statistics.median(times)
        yield Figure(
            name=f"poll of the event log {kind}, p99",
            value=slow,
            unit="ms",
            least=min(times),
            most=max(times),
            limit=f"≤ {MOST_POLL_MS:g} ms",
            # The slowest polls are also those that other work on the machine held up.
            is_met=True if slow <= MOST_POLL_MS else False if middle > MOST_POLL_MS else None,
            note=f"{rows:,} events, {polls} polls of at most 100; median {middle:.2f} ms",
        )
