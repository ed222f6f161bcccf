"""Queues stored events for the endpoints of their jobs, in the transaction that stores them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from simpletuner.config.webhook import WebhookEndpoint
from simpletuner.events import EventType
from simpletuner.job import TERMINAL
from simpletuner.store.event_row import StoredEvent
from simpletuner.store.schema import deliveries, webhooks

PENDING = "pending"
_GOING_ON = frozenset({"running", "resumed", "stopping"})


@dataclass(slots=True)
class ProgressGate:
    """Lets one `training.progress` per `interval_s` through, by the times of the events: they may be stored late.

    The last one before an end is let through then, though it came too early.
    """

    interval_s: float
    progress_at: str | None
    held_index: int | None

    def admit(self, index: int, body: dict[str, Any], *, wanted: bool) -> Iterator[int]:
        """Indices of the events to deliver now, in order. Also an end that nobody wants lets the held one through."""
        if self.held_index is not None and _ends_a_run(body):
            yield self.held_index
            self.held_index = None
        if not wanted:
            return
        if body["type"] == EventType.TRAINING_PROGRESS:
            at = str(body.get("timestamp", ""))
            if not self._is_last(body) and self._is_early(at):
                self.held_index = index
                return
            self.progress_at, self.held_index = at, None
        yield index

    def _is_last(self, body: dict[str, Any]) -> bool:
        progress: dict[str, Any] = body.get("progress") or {}
        return progress.get("current") is not None and progress.get("current") == progress.get("total")

    def _is_early(self, at: str) -> bool:
        if not self.interval_s or self.progress_at is None:
            return False
        try:
            passed = datetime.fromisoformat(at) - datetime.fromisoformat(self.progress_at)
        except ValueError:
            return False  # a line that tells no time must not stop the job's journal
        return 0 <= passed.total_seconds() < self.interval_s


def fan_out(connection: Connection, stored: Sequence[StoredEvent]) -> None:
    """One delivery for each endpoint that wants an event."""
    jobs = {event.job_id for event in stored if event.job_id is not None}
    hooks = connection.execute(select(webhooks).where(webhooks.c.job_id.in_(jobs)).order_by(webhooks.c.id)).all()
    rows: list[dict[str, Any]] = []
    now_s = time.time()
    for hook in hooks:
        endpoint = stored_endpoint(hook.endpoint)
        gate = ProgressGate(hook.interval_s, hook.progress_at, hook.held_index)
        for event in stored:
            if event.job_id != hook.job_id:
                continue
            body: dict[str, Any] = json.loads(event.body)
            wanted = endpoint.wants(event.type, body.get("severity", "info"))
            admitted = gate.admit(event.index, body, wanted=wanted)
            rows += [_new_delivery(hook.id, hook.job_id, index, now_s) for index in admitted]
        if (gate.progress_at, gate.held_index) != (hook.progress_at, hook.held_index):
            values = {"progress_at": gate.progress_at, "held_index": gate.held_index}
            connection.execute(update(webhooks).where(webhooks.c.id == hook.id).values(values))
    if rows:
        connection.execute(insert(deliveries), rows)


def stored_endpoint(row: dict[str, Any]) -> WebhookEndpoint:
    """Unchecked: it was checked when its job was accepted, and a later, stricter version must not stop that job."""
    return WebhookEndpoint.model_construct(**row)


def _new_delivery(webhook_id: int, job_id: str, event_index: int, now_s: float) -> dict[str, Any]:
    return {
        "id": secrets.token_hex(8),
        "webhook_id": webhook_id,
        "job_id": job_id,
        "event_index": event_index,
        "status": PENDING,
        "attempts": 0,
        "created_s": now_s,
        "next_s": now_s,
    }


def _ends_a_run(body: dict[str, Any]) -> bool:
    data: dict[str, Any] = body.get("data") or {}
    if body["type"] == EventType.JOB_STATUS:
        return data.get("to") in TERMINAL
    return body["type"] == EventType.TRAINING_STATUS and data.get("status") not in _GOING_ON
