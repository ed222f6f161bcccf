"""Requests to a running job, shared by the routes that name it in their path and those that name it in their body."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from simpletuner.errors import UserError
from simpletuner.job import Command, CommandName, JobStatus
from simpletuner.server.core import Core
from simpletuner.server.identity import Identity
from simpletuner.server.sight import CANCEL, find_job, seen
from simpletuner.store.job_row import JobRow


class ControlAnswer(BaseModel):
    success: bool = True
    message: str
    job_id: str
    status: str


class RequestAnswer(BaseModel):
    message: str
    job_id: str
    request_id: str


def find_active(core: Core, identity: Identity, job_id: str | None) -> JobRow:
    """The job that a request without a name means: the only active one."""
    if job_id is not None:
        return find_job(core, identity, job_id, CANCEL)
    active = seen(identity, core.store.jobs.latest_active())
    if not active:
        raise UserError("no_active_job", "No job is running.", hint="Start one, or name a queued one by its job_id.")
    if len(active) > 1:
        names = ", ".join(job.job_id for job in active)
        raise UserError("ambiguous_job", f"{len(active)} jobs are running: {names}.", hint="Name one with job_id.")
    return find_job(core, identity, active[0].job_id, CANCEL)


def stop(core: Core, identity: Identity, job_id: str | None) -> ControlAnswer:
    job = find_active(core, identity, job_id)
    if job.status.is_terminal:
        raise UserError("job_not_running", f"Job {job.job_id} is {job.status}.")
    job = core.supervisor.request_end(job.job_id, "stop")
    message = "Stopping after the current step" if job.status is JobStatus.STOPPING else f"Job is {job.status}"
    return ControlAnswer(message=message, job_id=job.job_id, status=job.status)


def cancel(core: Core, identity: Identity, job_id: str | None) -> tuple[ControlAnswer, bool]:
    """The answer, and whether there was anything left to cancel."""
    job = find_active(core, identity, job_id)
    if job.status.is_terminal:
        answer = ControlAnswer(message=f"Job was already {job.status}", job_id=job.job_id, status=job.status)
        return answer, False
    job = core.supervisor.request_end(job.job_id, "cancel")
    message = "Cancelled" if job.status is JobStatus.CANCELLED else "Cancelling"
    return ControlAnswer(message=message, job_id=job.job_id, status=job.status), True


def pause(core: Core, identity: Identity, job_id: str) -> ControlAnswer:
    job = find_job(core, identity, job_id, CANCEL)
    if job.status not in {JobStatus.STARTING, JobStatus.RUNNING}:
        raise UserError("job_not_running", f"Job {job_id} is {job.status}: only a running job can be paused.")
    job = core.supervisor.pause(job_id)
    return ControlAnswer(message="Pausing after the current step", job_id=job_id, status=job.status)


def resume(core: Core, identity: Identity, job_id: str) -> ControlAnswer:
    """Also of a job that is still on its way to its pause."""
    job = find_job(core, identity, job_id, CANCEL)
    if not job.paused or job.status.is_terminal:
        raise UserError("job_not_running", f"Job {job_id} is {job.status} and not paused.")
    job = core.supervisor.resume(job_id)
    return ControlAnswer(message="Goes on as soon as its devices are free", job_id=job_id, status=job.status)


def request_step(
    core: Core, identity: Identity, job_id: str | None, what: Literal["validate", "checkpoint"]
) -> RequestAnswer:
    """Have the trainer validate or checkpoint after its next gradient sync."""
    job = find_active(core, identity, job_id)
    if not job.status.is_active:
        raise UserError("no_active_job", f"Job {job.job_id} is {job.status}.")
    if job.status is not JobStatus.RUNNING:
        raise UserError("job_not_stepping", f"Job {job.job_id} is {job.status}: it takes no steps.")
    command = Command(command=CommandName(what))
    core.placement.executor_of(job).send(core.placement.job_dir(job.job_id), command)
    return RequestAnswer(
        message=f"Asked to {what} after the next step", job_id=job.job_id, request_id=command.request_id
    )
