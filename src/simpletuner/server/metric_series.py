"""The numbers of a job's steps, thinned: `GET /api/jobs/{id}/metrics` (api.md §2.8)."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from simpletuner.errors import UserError
from simpletuner.events import EventType
from simpletuner.run_lock import LOCK, METRICS, read_lock
from simpletuner.server.core import Core
from simpletuner.store.job_row import JobRow

Point = tuple[int, float | None]
T = TypeVar("T")

_BEFORE_STEP = b'{"step": '


class JobMetrics(BaseModel):
    """`series`: by name, `[step, value]` in order of steps; a value is null where it was no number."""

    series: dict[str, list[Point]]
    last_step: int | None


def read_metrics(core: Core, job: JobRow, *, names: Collection[str], since_step: int, max_points: int) -> JobMetrics:
    """Of steps from `since_step`, every n-th and the last, so that there are at most `max_points` of each series.

    All steps are in the output folder as long as the latest run in it is this job's; afterwards there are those that
    its events tell, one a second.
    """
    file = _own_file(job)
    rows = list(_file_rows(file, since_step, max_points) if file else _event_rows(core, job, since_step, max_points))
    series: dict[str, list[Point]] = {}
    for row in rows:
        step = int(row.pop("step"))
        for name, value in row.items():
            if not names or name in names:
                series.setdefault(name, []).append((step, value))
    last = max((points[-1][0] for points in series.values()), default=None)
    return JobMetrics(series=series, last_step=last)


def _own_file(job: JobRow) -> Path | None:
    folder = Path(job.output_dir)
    try:
        lock = read_lock(folder / LOCK)
    except UserError:
        return None
    return folder / METRICS if lock.latest_job_id == job.job_id and (folder / METRICS).exists() else None


def _file_rows(file: Path, since_step: int, max_points: int) -> Iterator[dict[str, Any]]:
    """Only the lines that are chosen are parsed: a run of a million steps answers in a second."""
    with file.open("rb") as lines:
        count = sum(_is_wanted(line, since_step) for line in lines)
        lines.seek(0)
        wanted = (line for line in lines if _is_wanted(line, since_step))
        for line in _chosen(count, max_points, wanted):
            yield json.loads(line)


def _is_wanted(line: bytes, since_step: int) -> bool:
    """A torn last line, which a live run may be writing, is none."""
    return line.endswith(b"\n") and int(line[len(_BEFORE_STEP) : line.index(b",")]) >= since_step


def _event_rows(core: Core, job: JobRow, since_step: int, max_points: int) -> Iterator[dict[str, Any]]:
    told = [event.as_dict()["progress"] for event in core.store.events.of_type(job.job_id, EventType.TRAINING_PROGRESS)]
    told = [progress for progress in told if progress["current"] >= since_step]
    for progress in _chosen(len(told), max_points, iter(told)):
        yield {"step": progress["current"], **progress["metrics"]}


def _chosen(count: int, most: int, items: Iterator[T]) -> Iterator[T]:
    """Every n-th of `count` items, the last among them."""
    stride = -(-count // most)
    return islice(items, (count - 1) % stride if count else 0, count, max(1, stride))
