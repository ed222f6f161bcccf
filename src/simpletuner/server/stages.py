"""The newest state of each start-up stage of a job, read forward from the event store."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from simpletuner.events import EventType
from simpletuner.store.event_filter import EventFilter
from simpletuner.store.events import EventStore

KEPT_JOBS = 32
PAGE = 1000


@dataclass
class _Seen:
    next_index: int = 0
    stages: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


class StageBoard:
    """A long cache build writes thousands of stage events; each is read once, however often a client asks."""

    def __init__(self, events: EventStore) -> None:
        self._events = events
        self._jobs: OrderedDict[str, _Seen] = OrderedDict()
        self._lock = threading.Lock()

    def of_job(self, job_id: str) -> dict[str, dict[str, Any]]:
        """Stage key → `{label, progress_type, status, percent, current, total}` (api.md §8.3)."""
        wanted = EventFilter(job_id=job_id, types=(EventType.LIFECYCLE_STAGE,))
        with self._lock:
            seen = self._jobs.setdefault(job_id, _Seen())
            self._jobs.move_to_end(job_id)
            if len(self._jobs) > KEPT_JOBS:
                self._jobs.popitem(last=False)
            has_more = True
            while has_more:
                page = self._events.page(seen.next_index, wanted, limit=PAGE)
                for event in page.events:
                    stage: dict[str, Any] = event.as_dict().get("stage") or {}
                    seen.stages[str(stage.get("key"))] = _shown(stage)
                seen.next_index, has_more = page.next_index, page.has_more
            return dict(seen.stages)


def _shown(stage: dict[str, Any]) -> dict[str, Any]:
    shown = {name: stage.get(name) for name in ("label", "status", "percent", "current", "total")}
    return {"progress_type": "count" if stage.get("total") else "state", **shown}
