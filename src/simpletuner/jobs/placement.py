"""Carries the scheduler's plan out: reads the queue, leases devices, launches runners, announces waits."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from simpletuner.errors import ExitCode
from simpletuner.events import JobWaitingData
from simpletuner.job import ACTIVE, ExitRecord, JobDir, JobStatus
from simpletuner.jobs.device_memory import MemoryGauge
from simpletuner.jobs.devices import Device
from simpletuner.jobs.executor import Executor
from simpletuner.jobs.scheduler import Candidate, Limits, Occupant, Start, Wait, plan
from simpletuner.store.job_row import JobRow, Move, NewJob
from simpletuner.store.settings import FAIR_SHARE, GPU_MAX_CONCURRENT, JOB_MAX_CONCURRENT, USER_MAX_CONCURRENT
from simpletuner.store.store import Store

WAITING = (JobStatus.QUEUED, JobStatus.BLOCKED)


class Placement:
    """Without `gauge`, free memory is not asked for."""

    def __init__(
        self,
        store: Store,
        executor: Executor,
        devices: Sequence[Device],
        jobs_root: Path,
        *,
        gauge: MemoryGauge | None = None,
    ) -> None:
        self._store = store
        self._executor = executor
        self.devices = tuple(devices)
        self.jobs_root = jobs_root
        self._gauge = gauge

    def job_dir(self, job_id: str) -> JobDir:
        return JobDir(self.jobs_root / job_id)

    def limits(self) -> Limits:
        settings = self._store.settings
        return Limits(
            max_jobs=settings.get(JOB_MAX_CONCURRENT, 1),
            max_devices=settings.get(GPU_MAX_CONCURRENT),
            max_jobs_per_user=settings.get(USER_MAX_CONCURRENT),
            fair_share=settings.get(FAIR_SHARE, False),
        )

    def plan(self, extra: NewJob | None = None) -> list[Start | Wait]:
        """What would happen now, with `extra` at the end of the queue. Writes nothing."""
        return self._plan(self._store.jobs.with_status(WAITING), extra)

    def waits(self) -> dict[str, Wait]:
        return {answer.job_id: answer for answer in self.plan() if isinstance(answer, Wait)}

    def starts_without(self, gone: Collection[str], job_id: str) -> bool:
        """Whether `job_id` could start if the jobs `gone` had ended. Writes nothing."""
        answers = self._plan(self._store.jobs.with_status(WAITING), gone=gone)
        return any(answer.job_id == job_id and isinstance(answer, Start) for answer in answers)

    def place(self) -> None:
        """Start what can start, tell the others why they wait."""
        queued = {job.job_id: job for job in self._store.jobs.with_status(WAITING)}
        waits: dict[str, JobWaitingData] = {}
        for answer in self._plan(list(queued.values())):
            job = queued[answer.job_id]
            if isinstance(answer, Start):
                self._start(job, answer.devices)
                continue
            wait = JobWaitingData(position=answer.position, reason=answer.reason, reason_code=answer.reason_code)
            if job.wait != wait.model_dump():
                waits[job.job_id] = wait
        if waits:
            self._store.jobs.announce_waits(waits)

    def _plan(
        self, queued: Sequence[JobRow], extra: NewJob | None = None, *, gone: Collection[str] = ()
    ) -> list[Start | Wait]:
        now = datetime.now(UTC)
        queue = [_candidate(job) for job in queued]
        if extra is not None:
            order = 1 + max((job.position for job in queued), default=0)
            queue.append(_new_candidate(extra, order, now))
        running = [
            Occupant(job_id=job.job_id, devices=job.devices or (), output_dir=job.output_dir, user_id=job.user_id or "")
            for job in self._store.jobs.with_status(ACTIVE)
            if job.job_id not in gone
        ]
        free_bytes: Mapping[int, int] = {}
        if self._gauge is not None and any(job.peak_bytes is not None for job in queue):
            free_bytes = self._gauge.free_bytes()
        return plan(queue, running, self.devices, self.limits(), now, free_bytes)

    def _start(self, job: JobRow, devices: tuple[int, ...]) -> None:
        folder = self.job_dir(job.job_id)
        self._prepare(folder, job, devices)
        leased = Move(
            job_id=job.job_id, from_=JobStatus.QUEUED, to=JobStatus.STARTING, attempt=job.attempt, devices=devices
        )
        if not self._store.jobs.move(leased):
            return
        try:
            self._executor.start(folder, [device for device in self.devices if device.index in devices])
        except OSError as error:
            # Its record ends the job the way every other job ends.
            folder.write_exit(
                ExitRecord(
                    code=ExitCode.OUTSIDE,
                    attempt=job.attempt,
                    error_code="launch_failed",
                    message=f"The runner could not be started: {error}",
                )
            )

    def _prepare(self, folder: JobDir, job: JobRow, devices: tuple[int, ...]) -> None:
        """What an earlier attempt left would be taken for this one's."""
        spec = folder.read_spec()
        changes = {"attempt": job.attempt, "devices": list(devices), "continues": job.started_at is not None}
        folder.write_spec(spec.model_copy(update=changes))
        for stale in (folder.root / "exit.json", folder.commands_path, folder.lock_path):
            stale.unlink(missing_ok=True)

    def remove_strays(self) -> list[str]:
        """Job folders without a row: a submit died before it was accepted. One that a runner holds is left alone."""
        known = self._store.jobs.ids()
        strays = [
            folder
            for folder in self.jobs_root.iterdir()
            if folder.is_dir() and folder.name not in known and not JobDir(folder).is_locked()
        ]
        for folder in strays:
            self._store.webhooks.forget(folder.name)
            shutil.rmtree(folder)
        return [folder.name for folder in strays]


def _candidate(job: JobRow) -> Candidate:
    new = _new_candidate(job, job.position, datetime.fromisoformat(job.queued_at or job.created_at))
    if job.paused or job.status is JobStatus.BLOCKED:
        return replace(new, is_paused=job.paused, needs_approval=job.status is JobStatus.BLOCKED)
    return new


def _new_candidate(job: NewJob, order: int, queued_at: datetime) -> Candidate:
    return Candidate(
        job_id=job.job_id,
        order=order,
        queued_at=queued_at,
        priority=job.given_priority,
        num_devices=job.num_devices,
        preferred=job.preferred_devices,
        any_gpu=job.any_gpu,
        output_dir=job.output_dir,
        user_id=job.user_id or "",
        target=job.target,
        peak_bytes=job.peak_bytes,
        needs_approval=job.requires_approval and not isinstance(job, JobRow),
    )
