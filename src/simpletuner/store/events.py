"""The event store: every job's journal and the server's own events under one durable counter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Connection, Row, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from simpletuner.events import EventType, read_journal
from simpletuner.store.database import Database
from simpletuner.store.event_filter import EventFilter
from simpletuner.store.event_row import StoredEvent
from simpletuner.store.fan_out import fan_out
from simpletuner.store.schema import events, journals

TAIL_BATCH = 2000


@dataclass(frozen=True, slots=True)
class Page:
    """Events of one read. `next_index` also passes those that were filtered out."""

    events: list[StoredEvent]
    next_index: int
    oldest_index: int
    has_more: bool


@dataclass(frozen=True, slots=True)
class _Batch:
    """What came of some lines; none of them may have been readable."""

    events: list[StoredEvent]


@dataclass(frozen=True, slots=True)
class OutboxEvent:
    id: str
    job_id: str | None
    event: dict[str, Any]


class EventStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def tail(self, job_id: str, journal: Path) -> list[StoredEvent]:
        """Store what was appended to `journal` since the last call.

        Rows and read position change in one transaction, so a line is stored once whatever dies in between. An
        event's number is its ordinal among the readable lines: a line cut short by a kill is passed over.
        """
        stored: list[StoredEvent] = []
        while batch := self._tail_batch(job_id, journal):
            stored += batch.events
        return stored

    def _tail_batch(self, job_id: str, journal: Path) -> _Batch | None:
        offset, seq = self._position(job_id)
        lines = list(islice(read_journal(journal, offset), TAIL_BATCH))
        if not lines:
            return None
        rows: list[dict[str, Any]] = []
        for _, line in lines:
            event = _parse(line)
            if event is not None:
                seq += 1
                row = {"id": f"{job_id}:{seq}", "job_id": job_id, "type": event["type"], "body": line.decode().strip()}
                rows.append(row)
        with self._database.write() as connection:
            stored = _insert(connection, rows)
            position = {"offset": lines[-1][0], "seq": seq}
            moved = connection.execute(
                update(journals).where(journals.c.job_id == job_id, journals.c.offset == offset).values(position)
            )
            if moved.rowcount == 0:
                connection.execute(insert(journals).values(job_id=job_id, **position))
        return _Batch(stored)

    def _position(self, job_id: str) -> tuple[int, int]:
        with self._database.read() as connection:
            row = connection.execute(
                select(journals.c.offset, journals.c.seq).where(journals.c.job_id == job_id)
            ).one_or_none()
        return (row.offset, row.seq) if row else (0, 0)

    def relay(self, rows: Iterable[OutboxEvent]) -> list[StoredEvent]:
        """Store the server's own events; one that is here already is left alone."""
        waiting = list(rows)
        if not waiting:
            return []
        with self._database.write() as connection:
            known = set(connection.scalars(select(events.c.id).where(events.c.id.in_([row.id for row in waiting]))))
            fresh = [
                {
                    "id": row.id,
                    "job_id": row.job_id,
                    "type": row.event["type"],
                    "body": json.dumps(row.event, ensure_ascii=False),
                }
                for row in waiting
                if row.id not in known
            ]
            return _insert(connection, fresh)

    def page(self, since_index: int, wanted: EventFilter, *, limit: int) -> Page:
        """Events from `since_index` on, inclusive."""
        with self._database.read() as connection:
            # Each by itself: asked for both at once, SQLite reads the whole table.
            oldest = connection.scalar(select(func.min(events.c.index))) or 1
            newest = connection.scalar(select(func.max(events.c.index))) or 0
            rows = connection.execute(
                select(events)
                .where(events.c.index >= since_index, wanted.clause())
                .order_by(events.c.index)
                .limit(limit + 1)
            ).all()
        found = [_stored(row) for row in rows[:limit]]
        has_more = len(rows) > limit
        next_index = found[-1].index + 1 if has_more else max(since_index, newest + 1)
        return Page(events=found, next_index=next_index, oldest_index=oldest, has_more=has_more)

    def newest_index(self) -> int:
        with self._database.read() as connection:
            return connection.scalar(select(func.max(events.c.index))) or 0

    def latest(self, job_ids: Sequence[str], *types: EventType) -> dict[tuple[str, str], StoredEvent]:
        """Job and type → the newest such event, where there is one."""
        newest = (
            select(func.max(events.c.index))
            .where(events.c.job_id.in_(job_ids), events.c.type.in_(types))
            .group_by(events.c.job_id, events.c.type)
        )
        with self._database.read() as connection:
            rows = connection.execute(select(events).where(events.c.index.in_(newest))).all()
        return {(cast(str, row.job_id), row.type): _stored(row) for row in rows}

    def of_type(self, job_id: str, type_: EventType) -> list[StoredEvent]:
        with self._database.read() as connection:
            rows = connection.execute(
                select(events).where(events.c.job_id == job_id, events.c.type == type_).order_by(events.c.index)
            ).all()
        return [_stored(row) for row in rows]

    def forget_position(self, job_id: str) -> None:
        """Of a deleted job; its events stay."""
        with self._database.write() as connection:
            connection.execute(delete(journals).where(journals.c.job_id == job_id))

    def ping(self) -> None:
        with self._database.read() as connection:
            connection.execute(select(1))

    def close(self) -> None:
        self._database.close()


def _insert(connection: Connection, rows: list[dict[str, Any]]) -> list[StoredEvent]:
    if not rows:
        return []
    start = connection.scalar(select(func.max(events.c.index))) or 0
    connection.execute(insert(events), rows)
    inserted = connection.execute(select(events).where(events.c.index > start).order_by(events.c.index)).all()
    if len(inserted) != len(rows):
        raise IntegrityError("another writer stored events in this transaction", None, ValueError(start))
    stored = [_stored(row) for row in inserted]
    fan_out(connection, stored)
    return stored


def _stored(row: Row[Any]) -> StoredEvent:
    return StoredEvent(*row)


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for a torn line: it can be cut inside a character, a string or an object."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict):
        return None
    found = cast(dict[str, Any], event)
    return found if isinstance(found.get("type"), str) else None
