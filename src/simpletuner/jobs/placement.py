"""Carries the scheduler's plan out: reads the queue, leases devices, launches runners, announces waits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simpletuner.errors import ExitCode
from simpletuner.events import JobWaitingData
from simpletuner.job import ExitRecord, JobDir, JobStatus
from simpletuner.jobs.device_memory import MemoryGauge
from simpletuner.jobs.devices import Device
from simpletuner.jobs.executor import Executor
from simpletuner.jobs.preemption import Preempt, plan_preemptions
from simpletuner.jobs.scheduler import LOCAL, WORKER, Candidate, Limits, Occupant, Start, Wait, plan
from simpletuner.jobs.worker_slot import WorkerSlot
from simpletuner.store.job_row import JobRow, Move, NewJob, Waiting
from simpletuner.store.settings import FAIR_SHARE, GPU_MAX_CONCURRENT, JOB_MAX_CONCURRENT, USER_MAX_CONCURRENT
from simpletuner.store.store import Store

NEAR = 100
"""Up to here every change of a position is told."""
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
        remote: Executor | None = None,
        worker_slots: Callable[[], Sequence[WorkerSlot]] = tuple,
        preempts: bool = True,
    ) -> None:
        self._store = store
        self._executor = executor
        self.devices = tuple(devices)
        self.jobs_root = jobs_root
        self._gauge = gauge
        self._remote = remote
        self._worker_slots = worker_slots
        self._preempts = preempts
        self._to_yield: list[Preempt] = []

    def job_dir(self, job_id: str) -> JobDir:
        return JobDir(self.jobs_root / job_id)

    def executor_of(self, job: JobRow) -> Executor:
        """Of where it runs or ran last."""
        return self._executor if job.worker_id is None or self._remote is None else self._remote

    def limits(self) -> Limits:
        settings = self._store.settings.all()
        return Limits(
            max_jobs=settings.get(JOB_MAX_CONCURRENT, 1),
            max_devices=settings.get(GPU_MAX_CONCURRENT),
            max_jobs_per_user=settings.get(USER_MAX_CONCURRENT),
            fair_share=settings.get(FAIR_SHARE, False),
        )

    def plan(self, extra: NewJob | None = None, *, without: Collection[str] = ()) -> list[Start | Wait]:
        """What would happen now, with `extra` at the end of the queue, and the running jobs `without` gone.

        Writes nothing.
        """
        return self._plan(extra, without)[0]

    def _plan(
        self, extra: NewJob | None = None, without: Collection[str] = ()
    ) -> tuple[list[Start | Wait], list[Preempt]]:
        now = datetime.now(UTC)
        waiting, holding = self._store.jobs.queue()
        queue = [
            _candidate(
                job,
                job.position,
                datetime.fromisoformat(job.queued_at),
                is_paused=job.paused,
                needs_approval=job.status == JobStatus.BLOCKED,
                gave_way_to=job.gave_way_to,
            )
            for job in waiting
        ]
        if extra is not None:
            last = max((job.position for job in waiting), default=0)
            queue.append(_candidate(extra, last + 1, now, needs_approval=extra.requires_approval))
        running = [
            Occupant(
                job_id=job.job_id,
                devices=tuple(job.devices or ()),
                output_dir=job.output_dir,
                user_id=job.user_id or "",
                worker_id=job.worker_id,
                priority=job.given_priority,
                started_order=order,
                is_ending=job.status == JobStatus.STOPPING,
            )
            for order, job in enumerate(sorted(holding, key=lambda job: job.started_at or ""))
            if job.job_id not in without
        ]
        free_bytes: Mapping[int, int] = {}
        if self._gauge is not None and any(job.peak_bytes is not None for job in queue):
            free_bytes = self._gauge.free_bytes()
        limits, workers = self.limits(), self._worker_slots()

        def plan_now(jobs: Sequence[Candidate], beside: Sequence[Occupant]) -> list[Start | Wait]:
            return plan(jobs, beside, self.devices, limits, now, free_bytes, workers)

        answers = plan_now(queue, running)
        if not self._preempts:
            return answers, []
        by_id = {job.job_id: job for job in queue}
        asked = plan_preemptions(answers, by_id, running, lambda job, beside: plan_now([job], beside)[0])
        return [_with_those_who_yield(answer, asked) for answer in answers], asked

    def waits(self) -> dict[str, Wait]:
        return {answer.job_id: answer for answer in self.plan() if isinstance(answer, Wait)}

    def place(self) -> list[Start | Wait]:
        """Start what can start, tell the others why they wait. Returns the plan that was carried out."""
        answers, self._to_yield = self._plan()
        if not answers:
            return answers
        for answer in answers:
            job = self._store.jobs.get(answer.job_id) if isinstance(answer, Start) else None
            if isinstance(answer, Start) and job is not None:
                self._start(job, answer)
        said = self._store.jobs.announced_waits()
        waits = {
            answer.job_id: JobWaitingData(
                position=answer.position, reason=answer.reason, reason_code=answer.reason_code
            )
            for answer in answers
            if isinstance(answer, Wait) and is_news(answer, said.get(answer.job_id))
        }
        if waits:
            self._store.jobs.announce_waits(waits)
        return answers

    def take_yields(self) -> list[Preempt]:
        """Jobs that are to make room, by the last plan that was carried out; told once."""
        taken, self._to_yield = self._to_yield, []
        return taken

    def most_devices(self, target: str) -> int | None:
        """Of the largest machine that is known for `target`; None where none is."""
        here = [len(self.devices)] if target != WORKER else []
        workers = self._worker_slots() if target != LOCAL else ()
        return max([*here, *(worker.num_devices for worker in workers)], default=None)

    def _start(self, job: JobRow, answer: Start) -> None:
        folder = self.job_dir(job.job_id)
        devices = answer.devices
        self._prepare(folder, job, devices)
        leased = Move(
            job_id=job.job_id,
            from_=JobStatus.QUEUED,
            to=JobStatus.STARTING,
            attempt=job.attempt,
            devices=devices,
            worker_id=answer.worker_id,
        )
        if not self._store.jobs.move(leased):
            return
        if answer.worker_id is not None and self._remote is not None:
            self._remote.start(folder, ())
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


def is_news(wait: Wait, said: Mapping[str, Any] | None) -> bool:
    """Far back a position is told again when a tenth of it is gone: else each start would be news to thousands."""
    if said is None or (said["reason"], said["reason_code"]) != (wait.reason, wait.reason_code):
        return True
    moved = abs(said["position"] - wait.position)
    return moved > 0 and (wait.position <= NEAR or moved * 10 >= said["position"])


def _candidate(
    job: Waiting | NewJob,
    order: int,
    queued_at: datetime,
    *,
    is_paused: bool = False,
    needs_approval: bool = False,
    gave_way_to: str | None = None,
) -> Candidate:
    return Candidate(
        job_id=job.job_id,
        order=order,
        queued_at=queued_at,
        priority=job.given_priority,
        num_devices=job.num_devices,
        preferred=tuple(job.preferred_devices),
        any_gpu=job.any_gpu,
        output_dir=job.output_dir,
        user_id=job.user_id or "",
        target=job.target,
        worker_labels=job.worker_labels or {},
        peak_bytes=job.peak_bytes,
        is_paused=is_paused,
        needs_approval=needs_approval,
        gave_way_to=gave_way_to,
    )


def _with_those_who_yield(answer: Start | Wait, asked: Sequence[Preempt]) -> Start | Wait:
    names = [each.job_id for each in asked if each.for_job == answer.job_id]
    if isinstance(answer, Start) or not names:
        return answer
    return replace(answer, reason=f"{answer.reason.rstrip('.')}. Job {', '.join(names)} gives way to it.")
