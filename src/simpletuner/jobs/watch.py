"""Looks at one unfinished job: carries its journal into the store and derives its next status.

A job of a server that died is looked at in the same way; there is no other recovery.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from simpletuner.errors import ExitCode
from simpletuner.events import EventType
from simpletuner.job import Command, CommandName, ExitRecord, JobDir, JobStatus
from simpletuner.jobs.executor import Executor
from simpletuner.jobs.outcome import VANISHED, judge
from simpletuner.store.event_row import StoredEvent
from simpletuner.store.job_row import JobRow, Move
from simpletuner.store.store import Store


class Watch:
    """`clock` is monotonic seconds. `executor_of` a job: whoever launched it."""

    def __init__(self, store: Store, executor_of: Callable[[JobRow], Executor], clock: Callable[[], float]) -> None:
        self._store = store
        self._executor_of = executor_of
        self._clock = clock
        self._free_since: dict[str, float] = {}
        self._known: set[str] = set()

    def observe(self, job: JobRow, folder: JobDir) -> list[StoredEvent]:
        """Returns the events that are new in the store."""
        # In this order: whoever is found gone has said everything before the journal is read.
        executor = self._executor_of(job)
        alive = executor.is_alive(folder)
        record = folder.read_exit()
        fresh = self._store.events.tail(job.job_id, folder.journal_path)
        if job.status is JobStatus.STARTING:
            job = self._enter_loop(job, fresh)
        if record is not None and record.attempt == job.attempt:
            self._end(job, folder, record)
        elif alive:
            self._free_since.pop(job.job_id, None)
            self._resend(job, folder)
        elif (refusal := executor.refusal(folder)) is not None:
            self._give_back(job, folder, refusal)
        elif self._is_lost(job, executor.lost_after_s(folder)):
            self._end(job, folder, None)
        self._known.add(job.job_id)
        return fresh

    def _enter_loop(self, job: JobRow, fresh: list[StoredEvent]) -> JobRow:
        """The trainer says so in its journal. At first sight the whole history is asked: an earlier server may have
        stored the event and died."""
        if job.job_id in self._known and not any(event.type == EventType.TRAINING_STATUS for event in fresh):
            return job
        said = self._store.events.of_type(job.job_id, EventType.TRAINING_STATUS)
        if not any(_is_loop_entry(event, job.attempt) for event in said):
            return job
        move = Move(job_id=job.job_id, from_=JobStatus.STARTING, to=JobStatus.RUNNING, attempt=job.attempt)
        self._store.jobs.move(move)
        return self._store.jobs.get(job.job_id) or job

    def _is_lost(self, job: JobRow, after_s: float) -> bool:
        now = self._clock()
        since = self._free_since.setdefault(job.job_id, now)
        return now - since >= after_s

    def _give_back(self, job: JobRow, folder: JobDir, refusal: str) -> None:
        """Nobody took it: what was asked of it meanwhile is done, else it waits again, as the same attempt."""
        if job.status is JobStatus.STOPPING:
            self._end(job, folder, ExitRecord(code=ExitCode.STOPPED, attempt=job.attempt, message="It had not begun."))
            return
        move = Move(job_id=job.job_id, from_=job.status, to=JobStatus.QUEUED, attempt=job.attempt, reason=refusal)
        if self._store.jobs.move(move):
            self._forget(job, folder, lost=False)

    def _resend(self, job: JobRow, folder: JobDir) -> None:
        """A server may die between storing a request and sending it; repeats are ignored by their id."""
        if job.status is JobStatus.STOPPING and job.mode and job.job_id not in self._known:
            self._executor_of(job).send(folder, end_command(job, job.mode))

    def _end(self, job: JobRow, folder: JobDir, record: ExitRecord | None) -> None:
        outcome = judge(
            status=job.status,
            mode=job.mode,
            record=record,
            attempt=job.attempt,
            max_attempts=job.max_attempts,
            vanished=self._how_it_vanished(job),
        )
        move = Move(
            job_id=job.job_id,
            from_=job.status,
            to=outcome.to,
            attempt=job.attempt,
            reason=outcome.reason,
            mode=job.mode or (record.mode if record else None),
            forced=record.forced if record else None,
            next_attempt=outcome.next_attempt,
            exit=exit_summary(record) if record else None,
        )
        if self._store.jobs.move(move):
            self._forget(job, folder, lost=record is None)

    def _how_it_vanished(self, job: JobRow) -> str:
        worker = self._store.workers.get(job.worker_id) if job.worker_id else None
        return f"Worker {worker.name} was not heard of until its lease ended." if worker else VANISHED

    def _forget(self, job: JobRow, folder: JobDir, *, lost: bool) -> None:
        self._free_since.pop(job.job_id, None)
        self._known.discard(job.job_id)
        self._executor_of(job).forget(folder, lost=lost)


def end_command(job: JobRow, mode: str) -> Command:
    return Command(command=CommandName(mode), request_id=f"{mode}-{job.job_id}-{job.attempt}")


def exit_summary(record: ExitRecord) -> dict[str, object]:
    """The `exit` of api.md §2.10."""
    return record.model_dump(include={"code", "signal", "error_code", "message", "hint", "log_tail"})


def _is_loop_entry(event: StoredEvent, attempt: int) -> bool:
    body = json.loads(event.body)
    return body.get("attempt") == attempt and body.get("data", {}).get("status") in {"running", "resumed"}
