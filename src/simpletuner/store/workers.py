"""Machines that dial in to run jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from simpletuner.errors import UserError
from simpletuner.events import AnyData, Event, EventType, utc_now
from simpletuner.store.database import Database
from simpletuner.store.outbox import put_event
from simpletuner.store.schema import workers


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """`gpu_info` is None until it has registered."""

    worker_id: str
    name: str
    worker_type: str
    labels: dict[str, str]
    told_labels: dict[str, str]
    gpu_info: dict[str, Any] | None
    version: str | None
    draining: bool
    quarantined: bool
    created_at: str
    connected_at: str | None
    last_heartbeat: str | None

    @property
    def all_labels(self) -> dict[str, str]:
        """Those set at the server win."""
        return self.told_labels | self.labels

    @property
    def num_devices(self) -> int:
        return int((self.gpu_info or {}).get("count", 0))


_COLUMNS = [column for column in workers.c if column.name != "token_hash"]


class WorkerStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, worker_id: str, name: str, worker_type: str, labels: Mapping[str, str], token_hash: str) -> None:
        """Raises UserError `already_exists`."""
        row = {
            "worker_id": worker_id,
            "name": name,
            "worker_type": worker_type,
            "token_hash": token_hash,
            "labels": dict(labels),
            "told_labels": {},
            "draining": False,
            "quarantined": False,
            "created_at": utc_now(),
        }
        try:
            with self._database.write() as connection:
                connection.execute(insert(workers).values(row))
        except IntegrityError as error:
            raise _taken(name) from error

    def get(self, worker_id: str) -> WorkerRow | None:
        return self._one(workers.c.worker_id == worker_id)

    def of_token(self, token_hash: str) -> WorkerRow | None:
        return self._one(workers.c.token_hash == token_hash)

    def all(self) -> list[WorkerRow]:
        """In order of name."""
        with self._database.read() as connection:
            rows = connection.execute(select(*_COLUMNS).order_by(workers.c.name)).all()
        return [WorkerRow(**row._mapping) for row in rows]  # pyright: ignore[reportPrivateUsage]

    def change(self, worker_id: str, **values: Any) -> bool:
        """Columns by name. False where there is none. Raises UserError `already_exists` for a name that is taken."""
        try:
            with self._database.write() as connection:
                changed = connection.execute(update(workers).where(workers.c.worker_id == worker_id).values(**values))
        except IntegrityError as error:
            raise _taken(str(values.get("name"))) from error
        return changed.rowcount > 0

    def delete(self, worker_id: str) -> bool:
        with self._database.write() as connection:
            return connection.execute(delete(workers).where(workers.c.worker_id == worker_id)).rowcount > 0

    def announce(self, worker: WorkerRow, status: str, was: str | None) -> None:
        """The event `worker.status`."""
        facts = {"worker_id": worker.worker_id, "name": worker.name, "from": was, "to": status}
        event = Event(
            type=EventType.WORKER_STATUS,
            message=f"Worker {worker.name} is {status}",
            data=AnyData.model_validate(facts),
        )
        with self._database.write() as connection:
            put_event(connection, event)

    def _one(self, condition: ColumnElement[bool]) -> WorkerRow | None:
        with self._database.read() as connection:
            row = connection.execute(select(*_COLUMNS).where(condition)).one_or_none()
        return None if row is None else WorkerRow(**row._mapping)  # pyright: ignore[reportPrivateUsage]


def _taken(name: str) -> UserError:
    return UserError(
        "already_exists", f"There is a worker {name} already.", hint="Choose another name.", pointer="/name"
    )
