"""The job table: inserts, guarded transitions with their events and device leases, and reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, delete, func, insert, select, true, update
from sqlalchemy.exc import IntegrityError

from simpletuner.events import Event, EventType, JobStatusData, JobWaitingData, Severity, utc_now
from simpletuner.job import ACTIVE, TRANSITIONS, JobStatus
from simpletuner.store.assignments import end_assignment, put_assignment
from simpletuner.store.claims import put_claim
from simpletuner.store.database import Database
from simpletuner.store.job_row import Claim, Holding, JobPage, JobQuery, JobRow, Move, NewJob, Waiting
from simpletuner.store.outbox import put_event, put_events
from simpletuner.store.schema import device_leases, jobs

LOCAL = "local"
_WAITING = (JobStatus.QUEUED, JobStatus.BLOCKED)
_WAITING_COLUMNS = (
    jobs.c.job_id, jobs.c.position, jobs.c.status, func.coalesce(jobs.c.queued_at, jobs.c.created_at),
    func.coalesce(jobs.c.priority_override, jobs.c.priority), jobs.c.num_devices, jobs.c.preferred_devices,
    jobs.c.any_gpu, jobs.c.output_dir, jobs.c.user_id, jobs.c.target, jobs.c.peak_bytes, jobs.c.paused,
    jobs.c.worker_labels, jobs.c.gave_way_to,
)  # fmt: skip
_HOLDING_COLUMNS = (
    jobs.c.job_id, jobs.c.devices, jobs.c.output_dir, jobs.c.user_id, jobs.c.worker_id,
    func.coalesce(jobs.c.priority_override, jobs.c.priority), jobs.c.started_at, jobs.c.status,
)  # fmt: skip


class JobStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def insert(self, job: NewJob, *, claim: Claim | None = None) -> JobRow:
        """Accept `job`, with its event and its idempotency key, in one transaction: queued, or blocked until approved.

        Raises IntegrityError when the key was claimed meanwhile.
        """
        now = utc_now()
        status = JobStatus.BLOCKED if job.requires_approval else JobStatus.QUEUED
        with self._database.write() as connection:
            values: dict[str, Any] = asdict(job) | {
                "preferred_devices": list(job.preferred_devices),
                "status": status,
                "forced": False,
                "attempt": 1,
                "created_at": now,
                "queued_at": now,
            }
            connection.execute(insert(jobs).values(values))
            if claim is not None:
                put_claim(connection, claim, job_id=job.job_id, created_at=now)
            data = JobStatusData.model_validate({"from": None, "to": status})
            message = "Waits for approval" if job.requires_approval else "Queued"
            put_event(connection, Event(type=EventType.JOB_STATUS, job_id=job.job_id, data=data, message=message))
            return _row(connection.execute(select(jobs).where(jobs.c.job_id == job.job_id)).one())

    def move(self, move: Move) -> bool:
        """Make the transition, its event and its leases one transaction.

        False when the row is not in `from_` any more, or a device was taken: nothing is changed then. Raises
        ValueError for a pair that api.md §4 does not list.
        """
        if move.to not in TRANSITIONS[move.from_]:
            raise ValueError(f"no transition {move.from_} -> {move.to}")
        try:
            with self._database.write() as connection:
                return _move(connection, move)
        except IntegrityError:
            return False

    def override_mode(self, job_id: str, *, from_mode: str, to_mode: str) -> bool:
        """Cancel overrides stop and stop overrides yield while a job is stopping."""
        with self._database.write() as connection:
            changed = connection.execute(
                update(jobs)
                .where(jobs.c.job_id == job_id, jobs.c.status == JobStatus.STOPPING, jobs.c.mode == from_mode)
                .values(mode=to_mode)
            )
        return changed.rowcount > 0

    def set_paused(self, job_id: str, paused: bool) -> None:
        """Whether the job is held back while it is queued."""
        with self._database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(paused=paused))

    def set_gave_way(self, job_id: str, for_job: str) -> None:
        with self._database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.job_id == job_id).values(gave_way_to=for_job))

    def set_priority(self, job_id: str, override: int | None) -> bool:
        """Of a job that waits; None gives it back to its user's level. False when it does not wait any more."""
        waiting = jobs.c.status.in_(_WAITING)
        with self._database.write() as connection:
            changed = connection.execute(
                update(jobs).where(jobs.c.job_id == job_id, waiting).values(priority_override=override)
            )
        return changed.rowcount > 0

    def announce_waits(self, waits: Mapping[str, JobWaitingData]) -> None:
        """Remember why jobs wait, with an event for each, in one transaction. Give only what changed."""
        with self._database.write() as connection:
            waiting = set(connection.scalars(select(jobs.c.job_id).where(jobs.c.status.in_(_WAITING))))
            told = {job_id: wait for job_id, wait in waits.items() if job_id in waiting}
            if not told:
                return
            connection.execute(
                update(jobs).where(jobs.c.job_id == bindparam("of_job")).values(wait=bindparam("said")),
                [{"of_job": job_id, "said": wait.model_dump()} for job_id, wait in told.items()],
            )
            put_events(
                connection,
                [
                    Event(type=EventType.JOB_WAITING, job_id=job_id, data=wait, message=wait.reason)
                    for job_id, wait in told.items()
                ],
            )

    def announced_waits(self) -> dict[str, dict[str, Any] | None]:
        """What was last said to those that wait."""
        with self._database.read() as connection:
            rows = connection.execute(select(jobs.c.job_id, jobs.c.wait).where(jobs.c.status.in_(_WAITING))).all()
        return {row[0]: row[1] for row in rows}

    def queue(self) -> tuple[list[Waiting], list[Holding]]:
        """Those that wait and those that run, of one moment, in order of creation."""
        with self._database.read() as connection:
            waiting = connection.execute(
                select(*_WAITING_COLUMNS).where(jobs.c.status.in_(_WAITING)).order_by(jobs.c.position)
            ).all()
            holding = connection.execute(
                select(*_HOLDING_COLUMNS).where(jobs.c.status.in_(list(ACTIVE))).order_by(jobs.c.position)
            ).all()
        return [Waiting._make(row) for row in waiting], [Holding._make(row) for row in holding]

    def get(self, job_id: str) -> JobRow | None:
        with self._database.read() as connection:
            row = connection.execute(select(jobs).where(jobs.c.job_id == job_id)).one_or_none()
        return _row(row) if row else None

    def with_status(self, statuses: Iterable[JobStatus]) -> list[JobRow]:
        """In order of creation."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(jobs).where(jobs.c.status.in_(list(statuses))).order_by(jobs.c.position)
            ).all()
        return [_row(row) for row in rows]

    def latest_active(self) -> list[JobRow]:
        """Active jobs, the latest started first."""
        return sorted(self.with_status(ACTIVE), key=_started, reverse=True)

    def queued_and_active(self) -> tuple[list[JobRow], list[JobRow]]:
        """Queued jobs in order of creation, and `latest_active`, of one moment."""
        jobs_now = self.with_status([JobStatus.QUEUED, *ACTIVE])
        queued = [job for job in jobs_now if job.status is JobStatus.QUEUED]
        active = [job for job in jobs_now if job.status is not JobStatus.QUEUED]
        return queued, sorted(active, key=_started, reverse=True)

    def latest_ended(self, *, user_id: str | None = None) -> JobRow | None:
        """Of one user, or of all."""
        owned = true() if user_id is None else jobs.c.user_id == user_id
        with self._database.read() as connection:
            row = connection.execute(
                select(jobs)
                .where(jobs.c.completed_at.is_not(None), owned)
                .order_by(jobs.c.completed_at.desc())
                .limit(1)
            ).one_or_none()
        return _row(row) if row else None

    def ids(self, *, user_id: str | None = None) -> set[str]:
        """Of one user, or of all."""
        owned = true() if user_id is None else jobs.c.user_id == user_id
        with self._database.read() as connection:
            return set(connection.scalars(select(jobs.c.job_id).where(owned)))

    def find(self, query: JobQuery) -> JobPage:
        """Newest first."""
        with self._database.read() as connection:
            total = connection.scalar(_filtered(select(func.count()).select_from(jobs), query)) or 0
            rows = connection.execute(
                _filtered(select(jobs), query).order_by(jobs.c.position.desc()).limit(query.limit).offset(query.offset)
            ).all()
        return JobPage([_row(row) for row in rows], total)

    def count_by_status(self) -> dict[JobStatus, int]:
        with self._database.read() as connection:
            rows = connection.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status)).all()
        return {JobStatus(status): count for status, count in rows}

    def count_by_user(self, *, user_id: str | None = None) -> dict[str, int]:
        """Unfinished jobs of each user, or of one."""
        unfinished = jobs.c.completed_at.is_(None) & jobs.c.user_id.is_not(None)
        owned = true() if user_id is None else jobs.c.user_id == user_id
        with self._database.read() as connection:
            rows = connection.execute(
                select(jobs.c.user_id, func.count()).where(unfinished, owned).group_by(jobs.c.user_id)
            ).all()
        return {row[0]: row[1] for row in rows}

    def latest_waits_s(self, most: int) -> list[float]:
        """How long each of the last `most` jobs that started had waited."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(jobs.c.queued_at, jobs.c.started_at)
                .where(jobs.c.started_at >= jobs.c.queued_at)
                .order_by(jobs.c.position.desc())
                .limit(most)
            ).all()
        return [
            (datetime.fromisoformat(started) - datetime.fromisoformat(queued)).total_seconds()
            for queued, started in rows
        ]

    def leases(self) -> dict[int, str]:
        """Local device → job that holds it."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(device_leases.c.device, device_leases.c.job_id).where(device_leases.c.machine == LOCAL)
            ).all()
        return {row.device: row.job_id for row in rows}

    def delete(self, job_id: str) -> bool:
        """Only a job that ended; its events stay in the event store."""
        with self._database.write() as connection:
            gone = connection.execute(delete(jobs).where(jobs.c.job_id == job_id, jobs.c.completed_at.is_not(None)))
        return gone.rowcount > 0


def _move(connection: Connection, move: Move) -> bool:
    changed = connection.execute(
        update(jobs)
        .where(jobs.c.job_id == move.job_id, jobs.c.status == move.from_, jobs.c.attempt == move.attempt)
        .values(_changes(move))
    )
    if changed.rowcount == 0:
        return False
    if move.to is JobStatus.STARTING and move.devices:
        machine = move.worker_id or LOCAL
        leases = [{"machine": machine, "device": device, "job_id": move.job_id} for device in move.devices]
        connection.execute(insert(device_leases), leases)
        if move.worker_id is not None:
            put_assignment(connection, move.job_id, move.worker_id)
    if move.to.is_terminal or move.to is JobStatus.QUEUED:
        connection.execute(delete(device_leases).where(device_leases.c.job_id == move.job_id))
        end_assignment(connection, move.job_id)
    put_event(connection, _status_event(move))
    return True


def _changes(move: Move) -> dict[str, Any]:
    now = utc_now()
    changes: dict[str, Any] = {"status": move.to, "status_reason": move.reason}
    given = {"mode": move.mode, "forced": move.forced, "attempt": move.next_attempt, "exit": move.exit}
    changes |= {name: value for name, value in given.items() if value is not None}
    if move.to is JobStatus.STARTING:
        changes |= {"started_at": now, "devices": list(move.devices or ()), "wait": None}
        changes |= {"worker_id": move.worker_id, "gave_way_to": None}
    if move.to is JobStatus.QUEUED:
        changes |= {"queued_at": now, "devices": None, "mode": None}
    if move.to.is_terminal:
        changes |= {"completed_at": now, "wait": None}
    return changes


def _status_event(move: Move) -> Event:
    attempt = move.next_attempt or move.attempt
    data = JobStatusData.model_validate(
        {"from": move.from_, "to": move.to, "reason": move.reason, "attempt": attempt, "exit": move.exit}
    )
    failed = move.to in {JobStatus.FAILED, JobStatus.LOST, JobStatus.REJECTED}
    return Event(
        type=EventType.JOB_STATUS,
        severity=Severity.ERROR if failed else Severity.INFO,
        job_id=move.job_id,
        attempt=attempt,
        message=move.reason or move.to.capitalize(),
        data=data,
    )


def _started(job: JobRow) -> tuple[str, int]:
    return job.started_at or "", job.position


def _filtered(statement: Select[Any], query: JobQuery) -> Select[Any]:
    if query.statuses:
        statement = statement.where(jobs.c.status.in_(query.statuses))
    for column, value in (
        (jobs.c.target, query.target),
        (jobs.c.config_name, query.config_name),
        (jobs.c.user_id, query.seen_user_id),
    ):
        if value is not None:
            statement = statement.where(column == value)
    if query.user_ids:
        statement = statement.where(jobs.c.user_id.in_(query.user_ids))
    if query.since is not None:
        statement = statement.where(jobs.c.created_at >= query.since)
    return statement


def _row(row: Row[Any]) -> JobRow:
    values = dict(row._mapping)  # pyright: ignore[reportPrivateUsage] - SQLAlchemy's public name for it
    values["status"] = JobStatus(values["status"])
    values["preferred_devices"] = tuple(values["preferred_devices"])
    values["devices"] = None if values["devices"] is None else tuple(values["devices"])
    return JobRow(**values)
