"""The outbox of `simpletuner train`, whose jobs have no row and no place in the server's history.

Its process delivers while it lives; what it leaves behind is delivered by the server of the same state directory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.webhook import frozen_endpoints
from simpletuner.job import JobDir, hold_lock, is_locked
from simpletuner.jobs.webhook_post import Poster
from simpletuner.jobs.webhooks import Courier
from simpletuner.store.database import Database
from simpletuner.store.events import EventStore
from simpletuner.store.webhooks import WebhookStore


@dataclass(frozen=True, slots=True)
class ForegroundOutbox:
    root: Path
    events: EventStore
    webhooks: WebhookStore

    @classmethod
    def open(cls, root: Path) -> ForegroundOutbox:
        """`root` is `<state>/foreground`."""
        root.mkdir(parents=True, exist_ok=True)
        database = Database.open(f"sqlite:///{root / 'events.db'}", "events")
        return cls(root, EventStore(database), WebhookStore(database))

    def hold(self, job: JobDir) -> AbstractContextManager[None]:
        """While it is held, the posts of `job` are the holder's."""
        return hold_lock(_lock_path(job.root))

    def courier(self, job: JobDir, poster: Poster) -> Courier:
        """Posts the journal of `job` while it grows. The caller holds it."""
        job_id = job.root.name
        self.webhooks.register(job_id, *frozen_endpoints(job.read_config()["config"]))
        return Courier(
            self.webhooks,
            poster,
            self.root,
            refill=lambda: self.events.tail(job_id, job.journal_path),
            may_deliver=lambda other: other == job_id,
        )

    def abandoned_courier(self, poster: Poster) -> Courier:
        """Posts what is left of jobs that nobody holds, with what their journals say beyond the outbox."""
        read: set[str] = set()

        def refill() -> None:
            for job_id in self.webhooks.jobs() - read:
                if self._is_abandoned(job_id):
                    job = JobDir(self.root / job_id)
                    # In this order: a run that is found ended has said everything before its journal is read.
                    has_ended = not job.is_locked()
                    self.events.tail(job_id, job.journal_path)
                    if has_ended:
                        read.add(job_id)

        return Courier(self.webhooks, poster, self.root, refill=refill, may_deliver=self._is_abandoned)

    def num_waiting(self, job_id: str) -> int:
        return self.webhooks.find(job_id=job_id, status="pending", limit=1, offset=0).total

    def close(self) -> None:
        self.events.close()

    def _is_abandoned(self, job_id: str) -> bool:
        return not is_locked(_lock_path(self.root / job_id))


def _lock_path(job_root: Path) -> Path:
    return job_root / "webhooks.lock"
