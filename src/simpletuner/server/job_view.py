"""A job as clients see it (api.md §2.10)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from simpletuner.events import EventType
from simpletuner.jobs.placement import WAITING
from simpletuner.server.core import Core
from simpletuner.store.job_row import JobRow


class ExitView(BaseModel):
    code: int | None = None
    signal: int | None = None
    error_code: str | None = None
    message: str | None = None
    hint: str | None = None
    log_tail: list[str] = []


class ProgressView(BaseModel):
    percent: float = 0.0
    step: int = 0
    total_steps: int = 0
    epoch: int | None = None
    total_epochs: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    eta_seconds: float | None = None
    metrics: dict[str, float | int | None] = {}


class JobView(BaseModel):
    job_id: str
    job_type: str = "training"
    target: str
    provider: str = "local"
    status: str
    status_reason: str | None
    config_name: str | None
    user_id: str | None
    created_at: str
    queued_at: str | None
    started_at: str | None
    completed_at: str | None
    duration_seconds: float | None
    attempt: int
    max_attempts: int
    retry_of: str | None
    allocated_gpus: list[int] | None
    worker_id: str | None = None
    queue_position: int | None
    priority: int
    progress: ProgressView | None
    exit: ExitView | None
    output_dir: str
    is_terminal: bool
    is_active: bool
    forced: bool
    cost_usd: float | None = None


def show_jobs(core: Core, rows: Sequence[JobRow]) -> list[JobView]:
    progress = show_progress(core, rows)
    waits = core.placement.waits() if any(row.status in WAITING for row in rows) else {}
    return [
        JobView(
            job_id=row.job_id,
            target=row.target,
            status=row.status,
            status_reason=waits[row.job_id].reason if row.job_id in waits else row.status_reason,
            config_name=row.config_name,
            user_id=row.user_id,
            created_at=row.created_at,
            queued_at=row.queued_at,
            started_at=row.started_at,
            completed_at=row.completed_at,
            duration_seconds=_duration_s(row),
            attempt=row.attempt,
            max_attempts=row.max_attempts,
            retry_of=row.retry_of,
            allocated_gpus=None if row.devices is None else list(row.devices),
            worker_id=row.worker_id,
            provider="local" if row.worker_id is None else "worker",
            queue_position=waits[row.job_id].position if row.job_id in waits else None,
            priority=row.given_priority,
            progress=progress.get(row.job_id),
            exit=None if row.exit is None else ExitView.model_validate(row.exit),
            output_dir=row.output_dir,
            is_terminal=row.status.is_terminal,
            is_active=row.status.is_active,
            forced=row.forced,
        )
        for row in rows
    ]


def show_progress(core: Core, rows: Sequence[JobRow]) -> dict[str, ProgressView]:
    """From each job's newest `training.progress`; the epochs stand in its newest `training.status` too."""
    ids = [row.job_id for row in rows]
    newest = core.store.events.latest(ids, EventType.TRAINING_PROGRESS, EventType.TRAINING_STATUS)
    shown: dict[str, ProgressView] = {}
    for job_id in ids:
        if (progress := newest.get((job_id, EventType.TRAINING_PROGRESS))) is None:
            continue
        status = newest.get((job_id, EventType.TRAINING_STATUS))
        data = {} if status is None else status.as_dict().get("data")
        shown[job_id] = _progress(progress.as_dict().get("progress") or {}, data or {})
    return shown


def _progress(progress: dict[str, Any], status: dict[str, Any]) -> ProgressView:
    metrics: dict[str, Any] = progress.get("metrics") or {}
    epoch = metrics.get("epoch", status.get("epoch"))
    return ProgressView(
        percent=progress.get("percent", 0.0),
        step=progress.get("current", 0),
        total_steps=progress.get("total", 0),
        epoch=None if epoch is None else int(epoch),
        total_epochs=status.get("final_epoch"),
        loss=metrics.get("loss"),
        learning_rate=metrics.get("learning_rate"),
        eta_seconds=progress.get("eta_seconds"),
        metrics=metrics,
    )


def _duration_s(row: JobRow) -> float | None:
    if row.started_at is None:
        return None
    end = datetime.fromisoformat(row.completed_at) if row.completed_at else datetime.now(UTC)
    return round((end - datetime.fromisoformat(row.started_at)).total_seconds(), 3)
