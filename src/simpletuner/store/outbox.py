"""Server events wait here, written with what they tell of, until they are in the event store."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select

from simpletuner.events import Event
from simpletuner.store.database import Database
from simpletuner.store.events import OutboxEvent
from simpletuner.store.schema import outbox


def put_event(connection: Connection, event: Event) -> None:
    """Add `event` to the transaction of `connection`."""
    put_events(connection, [event])


def put_events(connection: Connection, events: Sequence[Event]) -> None:
    """In this order; at least one."""
    rows = [
        {"job_id": event.job_id, "event": event.model_dump(mode="json", by_alias=True, exclude_none=True)}
        for event in events
    ]
    connection.execute(insert(outbox), rows)


class Outbox:
    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, event: Event) -> None:
        with self._database.write() as connection:
            put_event(connection, event)

    def waiting(self) -> list[tuple[int, OutboxEvent]]:
        """The `s` in an id keeps these numbers apart from those of the job's journal."""
        with self._database.read() as connection:
            rows = connection.execute(select(outbox).order_by(outbox.c.number)).all()
        return [
            (row.number, OutboxEvent(f"{row.job_id or 'server'}:s{row.number}", row.job_id, row.event)) for row in rows
        ]

    def forget(self, up_to: int) -> None:
        """Of events that are in the event store. A crash before this relays them again, under the same ids."""
        with self._database.write() as connection:
            connection.execute(delete(outbox).where(outbox.c.number <= up_to))
