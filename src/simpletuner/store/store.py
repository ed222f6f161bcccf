"""Both databases of a state directory, opened and migrated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpletuner.store.assignments import AssignmentStore
from simpletuner.store.audit import AuditStore
from simpletuner.store.claims import ClaimStore
from simpletuner.store.credentials import CredentialStore
from simpletuner.store.database import Database
from simpletuner.store.events import EventStore
from simpletuner.store.jobs import JobStore
from simpletuner.store.outbox import Outbox
from simpletuner.store.settings import SettingStore
from simpletuner.store.users import UserStore
from simpletuner.store.webhooks import WebhookStore
from simpletuner.store.workers import WorkerStore


@dataclass(frozen=True, slots=True)
class Store:
    database: Database
    jobs: JobStore
    workers: WorkerStore
    assignments: AssignmentStore
    claims: ClaimStore
    outbox: Outbox
    settings: SettingStore
    events: EventStore
    webhooks: WebhookStore
    users: UserStore
    credentials: CredentialStore
    audit: AuditStore

    @classmethod
    def open(cls, state_dir: Path, *, database_url: str | None = None, audit_kept_days: int = 0) -> Store:
        """Events have their own file: a long write there must not hold up a job's status."""
        database = Database.open(database_url or f"sqlite:///{state_dir / 'simpletuner.db'}", "state")
        events = Database.open(f"sqlite:///{state_dir / 'events.db'}", "events")
        return cls(
            database=database,
            jobs=JobStore(database),
            workers=WorkerStore(database),
            assignments=AssignmentStore(database),
            claims=ClaimStore(database),
            outbox=Outbox(database),
            settings=SettingStore(database),
            events=EventStore(events),
            webhooks=WebhookStore(events),
            users=UserStore(database),
            credentials=CredentialStore(database),
            audit=AuditStore(database, kept_days=audit_kept_days),
        )

    def close(self) -> None:
        self.events.close()
        self.database.close()
