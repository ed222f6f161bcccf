"""`python -m simpletuner.bench.event_log FOLDER ROWS POLLS`: what a poll of a long event log takes.

A program of its own, as the store is of the control world: it prints milliseconds of every poll, as JSON.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import insert

from simpletuner.store.database import Database
from simpletuner.store.event_filter import EventFilter
from simpletuner.store.events import EventStore
from simpletuner.store.schema import events

LIMIT = 100
JOBS = 8
_AT_ONCE = 50_000
_BEHIND = 10


def main(folder: Path, rows: int, polls: int) -> dict[str, list[float]]:
    """By kind of poll: a follower's, one from anywhere, one job's."""
    database = Database.open(f"sqlite:///{folder / 'events.db'}", "events")
    store = EventStore(database)
    try:
        fill(database, rows)
        chance = random.Random(0)
        everything = EventFilter()
        return {
            "at the end": _times(store, everything, lambda: rows - _BEHIND, polls),
            "from anywhere": _times(store, everything, lambda: chance.randrange(1, rows), polls),
            "of one job": _times(store, EventFilter(job_id="job-3"), lambda: chance.randrange(1, rows), polls),
        }
    finally:
        store.close()


def fill(database: Database, rows: int) -> None:
    """Progress of a few jobs that run side by side."""
    body = {"type": "training.progress", "timestamp": "2026-01-01T00:00:00.000Z", "message": "Step 1000 of 2000"}
    text = json.dumps(body | {"progress": {"current": 1000, "total": 2000, "percent": 50.0}, "loss": 0.123456})
    for start in range(0, rows, _AT_ONCE):
        numbers = range(start, min(rows, start + _AT_ONCE))
        with database.write() as connection:
            connection.execute(insert(events), [_row(number, body["type"], text) for number in numbers])


def _row(number: int, type_: str, body: str) -> dict[str, str]:
    job = f"job-{number % JOBS}"
    return {"id": f"{job}:{number // JOBS + 1}", "job_id": job, "type": type_, "body": body}


def _times(store: EventStore, wanted: EventFilter, since: Callable[[], int], polls: int) -> list[float]:
    """Milliseconds. The first poll is left out: it prepares the statement."""
    times: list[float] = []
    for _ in range(polls + 1):
        index = since()
        started_at = time.perf_counter()
        page = store.page(index, wanted, limit=LIMIT)
        times.append(1e3 * (time.perf_counter() - started_at))
        assert page.events, index
    return times[1:]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
