"""Who did what, kept for a while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, insert, or_, select

from simpletuner.events import utc_now
from simpletuner.store.account_schema import audit
from simpletuner.store.database import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """`detail` never holds a secret: its writers name what they put in."""

    actor_id: str | None
    actor: str
    action: str
    target: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])
    peer: str | None = None
    request_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEntry(AuditEntry):
    number: int
    at: str


@dataclass(frozen=True, slots=True)
class AuditPage:
    entries: list[StoredEntry]
    total: int


class AuditStore:
    def __init__(self, database: Database, *, kept_days: int = 0) -> None:
        """`kept_days` 0 keeps everything."""
        self._database = database
        self._kept_days = kept_days

    def record(self, entry: AuditEntry) -> None:
        """What is too old goes on the way."""
        values = {**asdict(entry), "at": utc_now()}
        with self._database.write() as connection:
            connection.execute(insert(audit).values(values))
            if self._kept_days:
                before = datetime.now(UTC) - timedelta(days=self._kept_days)
                connection.execute(delete(audit).where(audit.c.at < before.isoformat(timespec="milliseconds")))

    def find(self, *, actor: str | None, action: str | None, since: str | None, limit: int, offset: int) -> AuditPage:
        """Newest first. `actor` is a user's id or name."""
        wanted: list[ColumnElement[bool]] = []
        if actor is not None:
            wanted.append(or_(audit.c.actor_id == actor, audit.c.actor == actor))
        if action is not None:
            wanted.append(audit.c.action == action)
        if since is not None:
            wanted.append(audit.c.at >= since)
        clause = and_(True, *wanted)
        rows = select(audit).where(clause).order_by(audit.c.number.desc()).limit(limit).offset(offset)
        with self._database.read() as connection:
            total = connection.scalar(select(func.count()).select_from(audit).where(clause)) or 0
            found = connection.execute(rows).mappings().all()
        return AuditPage([StoredEntry(**row) for row in found], total)
