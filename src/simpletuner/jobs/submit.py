"""The one way into the queue: freezes a job on disk, accepts it into the table, places it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simpletuner.config.webhook import frozen_endpoints
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import JobDir, JobSpec, new_job_id
from simpletuner.jobs.placement import Placement
from simpletuner.jobs.scheduler import Wait
from simpletuner.jobs.supervisor import Supervisor
from simpletuner.store.job_row import Claim, JobRow, NewJob
from simpletuner.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A checked request. `config` maps bare option names to resolved values; `output_dir` is absolute."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    datasets: list[Any]
    workspace: str
    config_dir: str
    output_dir: str
    num_processes: int = 1
    preferred_devices: tuple[int, ...] = ()
    any_gpu: bool = False
    no_wait: bool = False
    priority: int = 10
    config_name: str | None = None
    user_id: str | None = None
    stop_grace_s: float = 600.0
    claim: Claim | None = None
    job_id: str = field(default_factory=new_job_id)


@dataclass(frozen=True, slots=True)
class Submitted:
    """`wait` is None when it was started at once."""

    job: JobRow
    wait: Wait | None


def submit(
    submission: Submission, *, store: Store, supervisor: Supervisor, before_accept: Callable[[], None] | None = None
) -> Submitted:
    """Accept `submission`; in this order: its folder, its webhooks, `before_accept` (the environment's file), its row.

    A crash in between leaves a folder without a row, which the next server removes with the webhooks. Raises UserError
    `gpus_unavailable`, with nothing written, when it can never run here or must not wait and would.
    """
    new = _new_job(submission)
    with supervisor.exclusive() as placement:
        _check_places(submission, new, placement)
        folder = _freeze(submission, placement)
        try:
            store.webhooks.register(new.job_id, *frozen_endpoints(submission.config))
            if before_accept is not None:
                before_accept()
            store.jobs.insert(new, claim=submission.claim)
        except BaseException:
            store.webhooks.forget(new.job_id)
            shutil.rmtree(folder.root)
            raise
        placement.place()
        job = store.jobs.get(new.job_id)
        if job is None:
            raise LookupError(f"job {new.job_id} vanished while it was placed")
        wait = placement.waits().get(new.job_id)
    supervisor.wake()
    return Submitted(job, wait)


def _new_job(submission: Submission) -> NewJob:
    return NewJob(
        job_id=submission.job_id,
        output_dir=submission.output_dir,
        num_devices=submission.num_processes,
        preferred_devices=submission.preferred_devices,
        any_gpu=submission.any_gpu,
        priority=submission.priority,
        config_name=submission.config_name,
        user_id=submission.user_id,
    )


def _check_places(submission: Submission, new: NewJob, placement: Placement) -> None:
    most = len(placement.devices)
    if new.num_devices > most:
        message = f"Rejected: needs {new.num_devices} devices; the largest machine has {most}."
        raise UserError("gpus_unavailable", message, hint="Lower num_processes.", exit_code=ExitCode.OUTSIDE)
    if not submission.no_wait:
        return
    for answer in placement.plan(new):
        if isinstance(answer, Wait) and answer.job_id == new.job_id:
            hint = "Leave no_wait out to queue it."
            raise UserError("gpus_unavailable", f"Rejected: {answer.reason}", hint=hint, exit_code=ExitCode.OUTSIDE)


def _freeze(submission: Submission, placement: Placement) -> JobDir:
    spec = JobSpec(
        job_id=submission.job_id,
        config_name=submission.config_name,
        workspace=submission.workspace,
        config_dir=submission.config_dir,
        output_dir=submission.output_dir,
        num_processes=submission.num_processes,
        stop_grace_s=submission.stop_grace_s,
    )
    return JobDir.create(
        placement.jobs_root / submission.job_id,
        spec,
        config=submission.config,
        provenance=submission.provenance,
        datasets=submission.datasets,
    )
