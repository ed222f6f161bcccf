"""The one way into the queue: freezes a job on disk, accepts it into the table, places it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simpletuner.config.webhook import frozen_endpoints
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import JobDir, JobSpec, JobStatus, new_job_id
from simpletuner.jobs.placement import Placement
from simpletuner.jobs.scheduler import Start, Wait
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
    priority_override: int | None = None
    target: str = "auto"
    worker_labels: dict[str, str] | None = None
    for_approval: bool = False
    max_attempts: int = 1
    retry_of: str | None = None
    peak_bytes: int | None = None
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


@dataclass(frozen=True, slots=True)
class Refused:
    """It is not accepted: `error` says so in a word or two, `reason` in a sentence."""

    error: str
    reason: str
    hint: str


class GpusUnavailable(UserError):
    """`refused` for those who answer with more than an error (api.md §8.6)."""

    def __init__(self, refused: Refused) -> None:
        reason = refused.reason[0].lower() + refused.reason[1:].rstrip(".")
        super().__init__("gpus_unavailable", f"Rejected: {reason}.", hint=refused.hint, exit_code=ExitCode.OUTSIDE)
        self.refused = refused


def submit(
    submission: Submission, *, store: Store, supervisor: Supervisor, before_accept: Callable[[], None] | None = None
) -> Submitted:
    """Accept `submission`; in this order: its folder, its webhooks, `before_accept` (the environment's file), its row.

    A crash in between leaves a folder without a row, which the next server removes with the webhooks. Raises
    GpusUnavailable, with nothing written, when it can never run here or must not wait and would.
    """
    new = _new_job(submission)
    with supervisor.exclusive() as placement:
        if isinstance(refused := _foresee(submission, new, placement, only_refusal=True), Refused):
            raise GpusUnavailable(refused)
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
        answers = placement.place()
        job = store.jobs.get(new.job_id)
        if job is None:
            raise LookupError(f"job {new.job_id} vanished while it was placed")
        wait = next((each for each in answers if each.job_id == new.job_id and isinstance(each, Wait)), None)
        if wait is None and job.status is JobStatus.QUEUED:
            # Its devices were leased by somebody else meanwhile.
            wait = placement.waits().get(new.job_id)
    supervisor.wake()
    return Submitted(job, wait)


def foresee(submission: Submission, *, supervisor: Supervisor) -> Start | Wait | Refused:
    """What `submit` would come to now. Writes nothing."""
    with supervisor.exclusive() as placement:
        answer = _foresee(submission, _new_job(submission), placement)
    if answer is None:
        raise LookupError("the plan has no answer for the job that it was asked about")
    return answer


def _foresee(
    submission: Submission, new: NewJob, placement: Placement, *, only_refusal: bool = False
) -> Start | Wait | Refused | None:
    """With `only_refusal`, nothing is planned for a job that will wait if it has to."""
    most = placement.most_devices(new.target)
    if most is not None and new.num_devices > most:
        noun = "slots" if all(device.kind == "cpu" for device in placement.devices) else "GPUs"
        reason = f"Needs {new.num_devices} {noun}; the largest machine has {most}."
        return Refused(f"Not enough {noun}", reason, "Lower num_processes.")
    if only_refusal and not submission.no_wait:
        return None
    answer = next((each for each in placement.plan(new) if each.job_id == new.job_id), None)
    if submission.no_wait and isinstance(answer, Wait):
        return Refused(_NO_ROOM.get(answer.reason_code, "Would wait"), answer.reason, "Leave no_wait out to queue it.")
    return answer


_NO_ROOM = {
    "gpus_busy": "No free GPU",
    "behind_head": "No free GPU",
    "gpu_memory": "No GPU with enough free memory",
    "no_matching_worker": "No worker",
    "workers_busy": "No free worker",
}


def _new_job(submission: Submission) -> NewJob:
    return NewJob(
        job_id=submission.job_id,
        output_dir=submission.output_dir,
        num_devices=submission.num_processes,
        preferred_devices=submission.preferred_devices,
        any_gpu=submission.any_gpu,
        priority=submission.priority,
        priority_override=submission.priority_override,
        target=submission.target,
        worker_labels=submission.worker_labels,
        requires_approval=submission.for_approval,
        max_attempts=submission.max_attempts,
        retry_of=submission.retry_of,
        peak_bytes=submission.peak_bytes,
        config_name=submission.config_name,
        user_id=submission.user_id,
    )


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
