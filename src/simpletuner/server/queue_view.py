"""The queue as clients see it (api.md §2.9, §8.5)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from pydantic import BaseModel

from simpletuner.errors import UserError
from simpletuner.job import ACTIVE, JobStatus
from simpletuner.jobs.placement import WAITING
from simpletuner.jobs.scheduler import WORKER, Start, Wait, effective_priority
from simpletuner.server.core import Core
from simpletuner.server.identity import Identity
from simpletuner.server.job_view import show_progress
from simpletuner.server.rights import denied
from simpletuner.store.job_row import JobQuery, JobRow
from simpletuner.store.settings import (
    CLOUD_MAX_CONCURRENT,
    FAIR_SHARE,
    GPU_MAX_CONCURRENT,
    JOB_MAX_CONCURRENT,
    USER_MAX_CONCURRENT,
)

VIEW_ALL = "queue.view.all"
CANCEL = "queue.cancel"
NAMES = ((40, "critical"), (30, "urgent"), (20, "high"), (10, "normal"), (0, "low"))
DEFAULTS: Mapping[str, int | bool | None] = {
    GPU_MAX_CONCURRENT: None,
    JOB_MAX_CONCURRENT: 1,
    CLOUD_MAX_CONCURRENT: 5,
    USER_MAX_CONCURRENT: None,
    FAIR_SHARE: False,
}
COUNTED = ("idle", "busy", "offline", "draining", "quarantined")
NUM_WAITS = 200
"""Of so many jobs that started last, the wait is averaged."""


class QueueEntry(BaseModel):
    id: int
    job_id: str
    user_id: str | None
    provider: str = "local"
    target: str
    config_name: str | None
    priority: int
    priority_name: str
    priority_override: int | None
    effective_priority: int
    status: str
    position: int | None
    reason: str | None
    reason_code: str | None
    queued_at: str | None
    started_at: str | None
    completed_at: str | None
    requires_approval: bool
    attempt: int
    error_message: str | None


class QueueList(BaseModel):
    entries: list[QueueEntry]
    total_pending: int
    total_running: int


class OwnQueue(BaseModel):
    pending_count: int
    running_count: int
    blocked_count: int
    best_position: int | None
    pending_jobs: list[QueueEntry]
    """The blocked ones among them."""
    running_jobs: list[QueueEntry]


class QueuePosition(BaseModel):
    job_id: str
    position: int | None
    status: str
    priority: int
    reason: str | None
    queued_at: str | None
    estimated_wait_seconds: float | None


class LocalStats(BaseModel):
    running_jobs: int
    pending_jobs: int
    allocated_gpus: list[int]
    available_gpus: list[int]
    total_gpus: int
    max_concurrent_gpus: int | None
    max_concurrent_jobs: int | None


class WorkerStats(BaseModel):
    """Of those that ever registered; one that is connecting counts in the total alone."""

    total_workers: int = 0
    idle_workers: int = 0
    busy_workers: int = 0
    offline_workers: int = 0
    draining_workers: int = 0
    quarantined_workers: int = 0


class QueueLimits(BaseModel):
    local_gpu_max_concurrent: int | None
    local_job_max_concurrent: int | None
    max_concurrent: int
    user_max_concurrent: int | None
    enable_fair_share: bool


class QueueStats(QueueLimits):
    by_status: dict[str, int]
    by_user: dict[str, int]
    queue_depth: int
    running: int
    avg_wait_seconds: float | None
    local: LocalStats
    workers: WorkerStats


def owner_seen(identity: Identity) -> str | None:
    """The only user whose entries are seen; None for all."""
    return None if identity.may(VIEW_ALL) else identity.user_id


def find_entry(core: Core, identity: Identity, job_id: str, verb: str | None = None) -> JobRow:
    """Raises UserError `unknown_job`, also of one that is hidden; `permission_denied` where it is only seen."""
    job = core.job(job_id)
    if owner_seen(identity) not in {None, job.user_id}:
        raise UserError("unknown_job", f"There is no job {job_id}.")
    if verb is not None and not identity.may_to(verb, job.user_id):
        raise denied(f"{verb}.all")
    return job


def show_entries(rows: Iterable[JobRow], waits: Mapping[str, Wait]) -> list[QueueEntry]:
    return [_show(row, waits.get(row.job_id)) for row in rows]


def unfinished(core: Core, waits: Mapping[str, Wait], owner: str | None) -> list[JobRow]:
    """Those that run, the oldest first, then those that wait, in the order in which they are served."""
    rows = core.store.jobs.with_status([*ACTIVE, *WAITING])
    last = len(waits) + 1

    def rank(row: JobRow) -> tuple[bool, int, int]:
        wait = waits.get(row.job_id)
        return row.status in WAITING, wait.position if wait else last, row.position

    return sorted((row for row in rows if owner in {None, row.user_id}), key=rank)


def show_own(core: Core, identity: Identity) -> OwnQueue:
    waits = core.placement.waits()
    entries = show_entries(unfinished(core, waits, identity.user_id), waits)
    pending = [entry for entry in entries if JobStatus(entry.status) in WAITING]
    running = [entry for entry in entries if JobStatus(entry.status).is_active]
    num_blocked = sum(entry.status == JobStatus.BLOCKED for entry in pending)
    positions = [entry.position for entry in pending if entry.position and entry.status == JobStatus.QUEUED]
    return OwnQueue(
        pending_count=len(pending) - num_blocked,
        running_count=len(running),
        blocked_count=num_blocked,
        best_position=min(positions, default=None),
        pending_jobs=pending,
        running_jobs=running,
    )


def show_position(core: Core, job: JobRow) -> QueuePosition:
    wait = core.placement.waits().get(job.job_id) if job.status in WAITING else None
    return QueuePosition(
        job_id=job.job_id,
        position=wait.position if wait else None,
        status=job.status,
        priority=priority_now(job),
        reason=wait.reason if wait else job.status_reason,
        queued_at=job.queued_at,
        estimated_wait_seconds=None if wait is None else _estimate_wait_s(core, job.job_id),
    )


def show_stats(core: Core, identity: Identity) -> QueueStats:
    """Counts are everybody's; who has how many is told of those who are seen."""
    counts = core.store.jobs.count_by_status()
    running, queued = sum(counts.get(status, 0) for status in ACTIVE), counts.get(JobStatus.QUEUED, 0)
    waits = core.store.jobs.latest_waits_s(NUM_WAITS)
    limits = read_limits(core)
    leases = core.store.jobs.leases()
    indices = [device.index for device in core.placement.devices]
    return QueueStats(
        **limits.model_dump(),
        by_status={status.value: count for status, count in sorted(counts.items())},
        by_user=core.store.jobs.count_by_user(user_id=owner_seen(identity)),
        queue_depth=queued,
        running=running,
        avg_wait_seconds=round(sum(waits) / len(waits), 3) if waits else None,
        local=LocalStats(
            running_jobs=len(set(leases.values())),
            pending_jobs=queued - _num_for_workers(core),
            allocated_gpus=[index for index in indices if index in leases],
            available_gpus=[index for index in indices if index not in leases],
            total_gpus=len(indices),
            max_concurrent_gpus=limits.local_gpu_max_concurrent,
            max_concurrent_jobs=limits.local_job_max_concurrent,
        ),
        workers=_count_workers(core),
    )


def _count_workers(core: Core) -> WorkerStats:
    statuses = Counter(slot.status for slot in core.fleet.slots())
    counts = {f"{status}_workers": statuses[status] for status in COUNTED}
    return WorkerStats(total_workers=statuses.total(), **counts)


def _num_for_workers(core: Core) -> int:
    """Queued jobs that this machine will not run."""
    return core.store.jobs.find(JobQuery(statuses=(JobStatus.QUEUED,), target=WORKER, limit=1)).total


def read_limits(core: Core) -> QueueLimits:
    settings = core.store.settings.all()
    return QueueLimits.model_validate({name: settings.get(name, default) for name, default in DEFAULTS.items()})


def priority_now(job: JobRow) -> int:
    """Grown by its wait, up to its start."""
    queued_at = datetime.fromisoformat(job.queued_at or job.created_at)
    waited_until = (
        datetime.now(UTC) if job.status in WAITING else datetime.fromisoformat(job.started_at or job.created_at)
    )
    return effective_priority(job.given_priority, queued_at, waited_until)


def _show(row: JobRow, wait: Wait | None) -> QueueEntry:
    return QueueEntry(
        id=row.position,
        job_id=row.job_id,
        user_id=row.user_id,
        target=row.target,
        config_name=row.config_name,
        priority=row.given_priority,
        priority_name=next(name for least, name in NAMES if row.given_priority >= least),
        priority_override=row.priority_override,
        effective_priority=priority_now(row),
        status=row.status,
        position=wait.position if wait else None,
        reason=wait.reason if wait else row.status_reason,
        reason_code=wait.reason_code if wait else None,
        queued_at=row.queued_at,
        started_at=row.started_at,
        completed_at=row.completed_at,
        requires_approval=row.requires_approval,
        attempt=row.attempt,
        error_message=(row.exit or {}).get("message"),
    )


def _estimate_wait_s(core: Core, job_id: str) -> float | None:
    """When the running jobs have said how long they will take, and enough of them end for this one to be started.

    None for one that also waits for jobs which have not started: how long they take nobody knows.
    """
    running = core.store.jobs.with_status(ACTIVE)
    left_s = _left_s(core, running)
    ending = sorted((left_s[job.job_id], job.job_id) for job in running if job.job_id in left_s)

    def starts_after(count: int) -> bool:
        answers = core.placement.plan(without={name for _, name in ending[: count + 1]})
        return any(answer.job_id == job_id and isinstance(answer, Start) for answer in answers)

    # Few plans also where hundreds run: who starts once some have ended, starts once more have.
    found = bisect_left(range(len(ending)), True, key=starts_after)
    return ending[found][0] if found < len(ending) else None


def _left_s(core: Core, running: Sequence[JobRow]) -> dict[str, float]:
    shown = show_progress(core, running)
    return {job_id: view.eta_seconds for job_id, view in shown.items() if view.eta_seconds is not None}
