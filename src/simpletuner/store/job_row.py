"""A job as the table holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from simpletuner.job import JobStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What a submit decides; the store adds times and number."""

    job_id: str
    output_dir: str
    num_devices: int = 1
    preferred_devices: tuple[int, ...] = ()
    any_gpu: bool = False
    priority: int = 10
    target: str = "auto"
    config_name: str | None = None
    user_id: str | None = None
    max_attempts: int = 1
    retry_of: str | None = None
    priority_override: int | None = None
    requires_approval: bool = False
    worker_labels: dict[str, str] | None = None
    peak_bytes: int | None = None

    @property
    def given_priority(self) -> int:
        """Before ageing: the override, else what follows the user's level."""
        return self.priority if self.priority_override is None else self.priority_override


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow(NewJob):
    position: int
    status: JobStatus
    created_at: str
    status_reason: str | None = None
    mode: str | None = None
    forced: bool = False
    attempt: int = 1
    devices: tuple[int, ...] | None = None
    queued_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    exit: dict[str, Any] | None = None
    wait: dict[str, Any] | None = None
    paused: bool = False
    worker_id: str | None = None
    """Where it runs or ran last; None for this machine."""
    gave_way_to: str | None = None
    """The urgent job that had it yield, until it starts again."""


class Waiting(NamedTuple):
    """What the planner asks of a job that waits: thousands of them are read each second."""

    job_id: str
    position: int
    status: JobStatus
    queued_at: str
    given_priority: int
    num_devices: int
    preferred_devices: list[int]
    any_gpu: bool
    output_dir: str
    user_id: str | None
    target: str
    peak_bytes: int | None
    paused: bool
    worker_labels: dict[str, str] | None
    gave_way_to: str | None


class Holding(NamedTuple):
    """What the planner asks of a job that runs."""

    job_id: str
    devices: list[int] | None
    output_dir: str
    user_id: str | None
    worker_id: str | None
    given_priority: int
    started_at: str | None
    status: JobStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A transition of api.md §4: refused unless the row still has `from_` and `attempt`."""

    job_id: str
    from_: JobStatus
    to: JobStatus
    attempt: int
    reason: str | None = None
    mode: str | None = None
    forced: bool | None = None
    next_attempt: int | None = None
    devices: tuple[int, ...] | None = None
    worker_id: str | None = None
    """Whose the `devices` are; None for this machine."""
    exit: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """An `Idempotency-Key`, taken in the transaction of its effect."""

    user_id: str
    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    fingerprint: str
    job_id: str
    """Empty where the effect is no job."""
    answer: dict[str, Any] | None
    """None while the request is being served."""
    created_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobQuery:
    statuses: tuple[JobStatus, ...] = ()
    target: str | None = None
    config_name: str | None = None
    user_ids: tuple[str, ...] = ()
    seen_user_id: str | None = None  # the only one whose jobs the asker sees
    since: str | None = None
    limit: int = 100
    offset: int = 0


@dataclass(frozen=True, slots=True)
class JobPage:
    jobs: list[JobRow] = field(default_factory=list[JobRow])
    total: int = 0
