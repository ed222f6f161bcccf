"""The outbox of webhooks: the endpoints of jobs, and what each of them has still to get.

It lies in the event database, so that an event and its deliveries are stored together or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, select, update

from simpletuner.config.webhook import WebhookEndpoint
from simpletuner.store.database import Database
from simpletuner.store.event_filter import among
from simpletuner.store.event_row import StoredEvent
from simpletuner.store.fan_out import PENDING, stored_endpoint
from simpletuner.store.schema import deliveries, events, webhooks

DeliveryStatus = Literal["pending", "delivered", "dead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRow:
    """Times are Unix seconds. `last_status` is the answer's HTTP status, None where none came."""

    number: int
    id: str
    webhook_id: int
    job_id: str
    event_index: int
    status: DeliveryStatus
    attempts: int
    created_s: float
    next_s: float
    last_status: int | None
    last_error: str | None
    endpoint: WebhookEndpoint
    event: StoredEvent | None = None


@dataclass(frozen=True, slots=True)
class DeliveryPage:
    deliveries: list[DeliveryRow]
    total: int


class WebhookStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def register(self, job_id: str, endpoints: Sequence[WebhookEndpoint], interval_s: float) -> None:
        """From now on the events of `job_id` are queued for `endpoints`."""
        rows = [
            {"job_id": job_id, "endpoint": endpoint.model_dump(mode="json"), "interval_s": interval_s}
            for endpoint in endpoints
        ]
        if rows:
            with self._database.write() as connection:
                connection.execute(insert(webhooks), rows)

    def forget(self, job_id: str) -> None:
        """Of a job that was never accepted."""
        with self._database.write() as connection:
            for table in (webhooks, deliveries):
                connection.execute(delete(table).where(table.c.job_id == job_id))

    def due(self, now_s: float) -> dict[int, str]:
        """The endpoints whose next delivery is due, with their jobs: what comes after it waits for it."""
        heads = select(func.min(deliveries.c.number)).where(deliveries.c.status == PENDING)
        heads = heads.group_by(deliveries.c.webhook_id)
        query = select(deliveries.c.webhook_id, deliveries.c.job_id)
        with self._database.read() as connection:
            rows = connection.execute(query.where(deliveries.c.number.in_(heads), deliveries.c.next_s <= now_s)).all()
        return {row.webhook_id: row.job_id for row in rows}

    def head(self, webhook_id: int) -> DeliveryRow | None:
        """The next delivery of an endpoint, with its event."""
        wanted = and_(deliveries.c.webhook_id == webhook_id, deliveries.c.status == PENDING)
        with self._database.read() as connection:
            row = connection.execute(_rows(wanted).order_by(deliveries.c.number).limit(1)).one_or_none()
            if row is None:
                return None
            event = connection.execute(select(events).where(events.c.index == row.event_index)).one_or_none()
        return _delivery(row, StoredEvent(*event) if event else None)

    def record(
        self,
        delivery: DeliveryRow,
        status: DeliveryStatus,
        *,
        next_s: float,
        last_status: int | None,
        last_error: str | None,
    ) -> None:
        """What an attempt came to."""
        values: dict[str, Any] = {
            "status": status,
            "attempts": delivery.attempts + 1,
            "next_s": next_s,
            "last_status": last_status,
            "last_error": last_error,
        }
        with self._database.write() as connection:
            connection.execute(update(deliveries).where(deliveries.c.number == delivery.number).values(values))

    def redeliver(self, delivery_id: str, *, now_s: float) -> DeliveryRow | None:
        """Queue it again, with all its time. None when there is no such delivery."""
        values = {"status": PENDING, "attempts": 0, "created_s": now_s, "next_s": now_s}
        with self._database.write() as connection:
            connection.execute(update(deliveries).where(deliveries.c.id == delivery_id).values(values))
            row = connection.execute(_rows(deliveries.c.id == delivery_id)).one_or_none()
        return _delivery(row) if row else None

    def get(self, delivery_id: str) -> DeliveryRow | None:
        with self._database.read() as connection:
            row = connection.execute(_rows(deliveries.c.id == delivery_id)).one_or_none()
        return _delivery(row) if row else None

    def find(
        self,
        *,
        job_id: str | None,
        of_jobs: set[str] | None = None,
        status: DeliveryStatus | None,
        limit: int,
        offset: int,
    ) -> DeliveryPage:
        """Newest first; `of_jobs` None means of all."""
        wanted: list[ColumnElement[bool]] = []
        if job_id is not None:
            wanted.append(deliveries.c.job_id == job_id)
        if of_jobs is not None:
            wanted.append(among(deliveries.c.job_id, of_jobs))
        if status is not None:
            wanted.append(deliveries.c.status == status)
        clause = and_(True, *wanted)
        with self._database.read() as connection:
            total = connection.scalar(select(func.count()).select_from(deliveries).where(clause)) or 0
            rows = connection.execute(
                _rows(clause).order_by(deliveries.c.number.desc()).limit(limit).offset(offset)
            ).all()
        return DeliveryPage([_delivery(row) for row in rows], total)

    def pending_jobs(self) -> set[str]:
        with self._database.read() as connection:
            return set(connection.scalars(select(deliveries.c.job_id).distinct().where(deliveries.c.status == PENDING)))

    def jobs(self) -> set[str]:
        """Those that have endpoints."""
        with self._database.read() as connection:
            return set(connection.scalars(select(webhooks.c.job_id).distinct()))


def _rows(clause: ColumnElement[bool]) -> Any:
    joined = deliveries.join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
    return select(deliveries, webhooks.c.endpoint).select_from(joined).where(clause)


def _delivery(row: Row[Any], event: StoredEvent | None = None) -> DeliveryRow:
    values = dict(row._mapping)  # pyright: ignore[reportPrivateUsage] - SQLAlchemy's public name for it
    values["endpoint"] = stored_endpoint(values["endpoint"])
    return DeliveryRow(**values, event=event)
