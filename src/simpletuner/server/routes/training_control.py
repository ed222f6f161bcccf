"""Stop, cancel, requests at the next step, status and checkpoints of the active job (api.md §2.4)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel

from simpletuner.errors import UserError
from simpletuner.job import JobStatus
from simpletuner.server import control
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.checkpoint_view import CheckpointCheck, CheckpointView, check_checkpoint, show_checkpoints
from simpletuner.server.config_view import show_config
from simpletuner.server.control import ControlAnswer, RequestAnswer
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.identity import Identity
from simpletuner.server.job_view import ProgressView, show_progress
from simpletuner.server.negotiation import message_fragment, wants_html_strictly
from simpletuner.server.option_body import JobIdDep, option_body_schema
from simpletuner.server.rate_limit import END
from simpletuner.server.rights import limited, needs
from simpletuner.server.sight import find_job, latest_ended, seen
from simpletuner.store.job_row import JobRow

router = APIRouter(prefix="/api/training", tags=["training", "configurations"])

JOB_BODY = option_body_schema({"job_id": "a1b2c3d4e5f6"})
ACTIVE_ERRORS = error_responses("no_active_job", "unknown_job", "ambiguous_job")
STEP_ERRORS = error_responses("no_active_job", "unknown_job", "ambiguous_job", "job_not_stepping")
JobQuery = Annotated[str | None, Query(max_length=64)]


class JobInfo(BaseModel):
    status: str
    status_detail: str | None = None
    error: str | None = None
    message: str | None = None
    attempt: int


class JobLine(BaseModel):
    job_id: str
    status: str
    config_name: str | None


class QueueDepth(BaseModel):
    depth: int
    running: int


class TrainingStatus(BaseModel):
    status: str
    job_id: str | None
    config: dict[str, Any] | None
    job_info: JobInfo | None
    progress: ProgressView | None
    startup_progress: dict[str, dict[str, Any]]
    jobs: list[JobLine]
    last_job: JobLine | None
    queue: QueueDepth


class CheckpointList(BaseModel):
    output_dir: str
    job_id: str | None
    checkpoints: list[CheckpointView]
    total: int


@router.post(
    "/stop",
    operation_id="stop_training",
    dependencies=[needs("job.cancel.*"), audits("job.stop"), limited(END)],
    status_code=202,
    response_model=ControlAnswer,
    responses=error_responses("no_active_job", "unknown_job", "ambiguous_job", "job_not_running"),
    openapi_extra=JOB_BODY,
)
def stop_training(core: CoreDep, identity: IdentityDep, note: AuditDep, request: Request, job_id: JobIdDep) -> Response:
    """Finish the step, save a checkpoint, end."""
    answer = control.stop(core, identity, job_id)
    note.target = answer.job_id
    return _negotiated(request, answer, 202)


@router.post(
    "/cancel",
    operation_id="cancel_training",
    dependencies=[needs("job.cancel.*"), audits("job.cancel"), limited(END)],
    status_code=202,
    response_model=ControlAnswer,
    responses=ACTIVE_ERRORS,
    openapi_extra=JOB_BODY,
)
def cancel_training(
    core: CoreDep, identity: IdentityDep, note: AuditDep, request: Request, job_id: JobIdDep
) -> Response:
    """End now, without a checkpoint. 200 when it had ended already."""
    answer, changed = control.cancel(core, identity, job_id)
    note.target, note.nothing_done = answer.job_id, not changed
    return _negotiated(request, answer, 202 if changed else 200)


def _negotiated(request: Request, answer: ControlAnswer, status: int) -> Response:
    if wants_html_strictly(request.headers):
        message = f"{answer.message}: {answer.job_id}"
        return HTMLResponse(message_fragment(message, ok=True, attributes={"job-id": answer.job_id}), status)
    return JSONResponse(answer.model_dump(), status)


@router.post(
    "/validation/run",
    operation_id="run_validation",
    dependencies=[needs("job.cancel.*"), audits("job.validate")],
    responses=STEP_ERRORS,
    openapi_extra=JOB_BODY,
)
def run_validation(core: CoreDep, identity: IdentityDep, note: AuditDep, job_id: JobIdDep) -> RequestAnswer:
    """Validate after the next gradient sync; the completion event carries the `request_id`."""
    answer = control.request_step(core, identity, job_id, "validate")
    note.target = answer.job_id
    return answer


@router.post(
    "/checkpoint/run",
    operation_id="run_checkpoint",
    dependencies=[needs("job.cancel.*"), audits("job.checkpoint")],
    responses=STEP_ERRORS,
    openapi_extra=JOB_BODY,
)
def run_checkpoint(core: CoreDep, identity: IdentityDep, note: AuditDep, job_id: JobIdDep) -> RequestAnswer:
    """Save a checkpoint after the next gradient sync."""
    answer = control.request_step(core, identity, job_id, "checkpoint")
    note.target = answer.job_id
    return answer


@router.get(
    "/status",
    operation_id="training_status",
    dependencies=[needs("job.view.*")],
    responses=error_responses("unknown_job"),
)
def training_status(core: CoreDep, identity: IdentityDep, job_id: JobQuery = None) -> TrainingStatus:
    """Of the latest started active job, or of `job_id`. A pure read."""
    waiting, running = core.store.jobs.queued_and_active()
    active = seen(identity, running)
    last = latest_ended(core, identity)
    job = find_job(core, identity, job_id) if job_id else (active[0] if active else None)
    return TrainingStatus(
        status="idle" if job is None else job.status,
        job_id=None if job is None else job.job_id,
        config=None if job is None else show_config(core, job).config,
        job_info=None if job is None else _job_info(job),
        progress=None if job is None else show_progress(core, [job]).get(job.job_id),
        startup_progress={} if job is None else core.stages.of_job(job.job_id),
        jobs=[_line(row) for row in active],
        last_job=None if last is None else _line(last),
        queue=QueueDepth(depth=len(waiting), running=len(active)),
    )


def _job_info(job: JobRow) -> JobInfo:
    failed = job.status in {JobStatus.FAILED, JobStatus.LOST, JobStatus.REJECTED}
    return JobInfo(
        status=job.status,
        status_detail=job.mode if job.status is JobStatus.STOPPING else None,
        error=job.status_reason if failed else None,
        message=job.status_reason,
        attempt=job.attempt,
    )


def _line(job: JobRow) -> JobLine:
    return JobLine(job_id=job.job_id, status=job.status, config_name=job.config_name)


CHECKPOINT_ERRORS = error_responses("unknown_config", "unknown_job", "not_found")


@router.get(
    "/checkpoints", operation_id="get_checkpoints", dependencies=[needs("job.view.*")], responses=CHECKPOINT_ERRORS
)
@router.post(
    "/checkpoints", operation_id="post_checkpoints", dependencies=[needs("job.view.*")], responses=CHECKPOINT_ERRORS
)
def get_checkpoints(
    core: CoreDep,
    identity: IdentityDep,
    job_id: JobQuery = None,
    environment: Annotated[str | None, Query(max_length=80)] = None,
) -> CheckpointList:
    """Newest first; of `job_id`, of `environment`, of the active environment, else of the last job."""
    output_dir, found_id = _output_dir(core, identity, job_id, environment)
    checkpoints = show_checkpoints(output_dir)
    return CheckpointList(output_dir=str(output_dir), job_id=found_id, checkpoints=checkpoints, total=len(checkpoints))


@router.get(
    "/checkpoints/validate/{name}",
    operation_id="validate_checkpoint",
    dependencies=[needs("job.view.*")],
    responses=CHECKPOINT_ERRORS,
)
def validate_checkpoint(
    core: CoreDep,
    identity: IdentityDep,
    name: str,
    job_id: JobQuery = None,
    environment: Annotated[str | None, Query(max_length=80)] = None,
) -> CheckpointCheck:
    """Whether every file of its manifest is there and has its hash."""
    return check_checkpoint(_output_dir(core, identity, job_id, environment)[0], name)


def _output_dir(core: Core, identity: Identity, job_id: str | None, environment: str | None) -> tuple[Path, str | None]:
    """Only of a job or an environment: there are no free paths."""
    if job_id is not None:
        job = find_job(core, identity, job_id)
        return Path(job.output_dir), job.job_id
    name = environment or core.active_environment()
    if name is not None:
        output = core.environments.read(name).config.get("--output_dir")
        if isinstance(output, str):
            return Path(core.directories.absolute(output)), None
    last = seen(identity, core.store.jobs.latest_active()) or [job for job in [latest_ended(core, identity)] if job]
    if not last:
        raise UserError("not_found", "No job has run and no environment is active.", hint="Name one of them.")
    return Path(last[0].output_dir), last[0].job_id
