"""What an ended attempt means for its job (api.md §4). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.errors import ExitCode
from simpletuner.job import ExitRecord, JobStatus

RETRYABLE_ERRORS = frozenset({"rank_lost", "device_fault"})
HOST_OUT_OF_MEMORY = "host_out_of_memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    to: JobStatus
    reason: str
    next_attempt: int | None = None


VANISHED = "The runner vanished without saying how the job ended."


def judge(
    *,
    status: JobStatus,
    mode: str | None,
    record: ExitRecord | None,
    attempt: int,
    max_attempts: int,
    vanished: str = VANISHED,
) -> Outcome:
    """`record` None means that the runner vanished without one, which `vanished` says to people."""
    mode = mode or (record.mode if record else None)
    if record is not None and record.code == ExitCode.DONE:
        return Outcome(to=JobStatus.COMPLETED, reason="Completed")
    if mode == "cancel" and status is JobStatus.STOPPING:
        return Outcome(to=JobStatus.CANCELLED, reason="Cancelled")
    if record is None:
        ended = Outcome(to=JobStatus.LOST, reason=vanished)
        return _retried(ended, mode, attempt, max_attempts)
    if record.code == ExitCode.STOPPED or record.forced:
        return _stopped(status, mode, record)
    ended = Outcome(to=JobStatus.FAILED, reason=_failure(record))
    return _retried(ended, mode, attempt, max_attempts) if _is_retryable(record) else ended


def _stopped(status: JobStatus, mode: str | None, record: ExitRecord) -> Outcome:
    if mode == "yield" and status is JobStatus.STOPPING:
        return Outcome(to=JobStatus.QUEUED, reason="Gave its devices back; resumes from the latest checkpoint.")
    how = "Stopped by force after the grace period" if record.forced else "Stopped"
    return Outcome(to=JobStatus.STOPPED, reason=how)


def _failure(record: ExitRecord) -> str:
    if record.message:
        return record.message
    if record.signal is not None:
        return f"The trainer was ended by signal {record.signal}."
    return f"The trainer ended with code {record.code}."


def _is_retryable(record: ExitRecord) -> bool:
    if record.error_code == HOST_OUT_OF_MEMORY:
        return False
    return record.signal is not None or record.error_code in RETRYABLE_ERRORS


def _retried(ended: Outcome, mode: str | None, attempt: int, max_attempts: int) -> Outcome:
    if mode is not None or attempt >= max_attempts:
        return ended
    return Outcome(to=JobStatus.QUEUED, reason=f"{ended.reason} Trying again.", next_attempt=attempt + 1)
