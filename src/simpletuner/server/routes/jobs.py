"""/api/jobs and its alias /api/cloud/jobs (api.md §2.10)."""

from __future__ import annotations

import shutil
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel

from simpletuner.errors import UserError
from simpletuner.events import EventType
from simpletuner.job import JobStatus
from simpletuner.jobs.event_view import Images, artifact_url, find_artifact, media_of
from simpletuner.server import control
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.config_view import JobConfig, show_config
from simpletuner.server.control import ControlAnswer, RequestAnswer
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.idempotency import REPLAYED_HEADER, IdempotencyKey, build_claim, find_answer
from simpletuner.server.job_view import JobView, show_jobs
from simpletuner.server.metric_series import JobMetrics, read_metrics
from simpletuner.server.purge import find_purgeable
from simpletuner.server.queue_submit import RetryBody, SubmitAnswer, build_from_job, enqueue
from simpletuner.server.rate_limit import END, START
from simpletuner.server.rights import limited, needs
from simpletuner.server.routes.events import EventPage, read_page
from simpletuner.server.sight import DELETE, find_job, owner_filter
from simpletuner.store.event_filter import EventFilter
from simpletuner.store.job_row import JobQuery

router = APIRouter(tags=["jobs", "training"])

UNKNOWN = error_responses("unknown_job")


class JobList(BaseModel):
    jobs: list[JobView]
    total: int


class OneJob(BaseModel):
    job: JobView


class Artifact(BaseModel):
    id: str
    kind: str
    mime_type: str
    bytes: int
    step: int | None
    url: str


class Success(BaseModel):
    success: bool = True


@router.get("", operation_id="list_jobs", dependencies=[needs("job.view.*")])
def list_jobs(
    core: CoreDep,
    identity: IdentityDep,
    response: Response,
    status: Annotated[list[JobStatus] | None, Query()] = None,
    target: str | None = None,
    config_name: str | None = None,
    user: Annotated[str | None, Query(description="Id or name of a user.", max_length=254)] = None,
    since: Annotated[str | None, Query(description="Created at or after this time.", max_length=40)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> JobList:
    """Newest first."""
    query = JobQuery(
        statuses=tuple(status or ()),
        target=target,
        config_name=config_name,
        user_ids=() if user is None else _user_ids(core, user),
        seen_user_id=owner_filter(identity),
        since=since,
        limit=limit,
        offset=offset,
    )
    page = core.store.jobs.find(query)
    response.headers["X-Total-Count"] = str(page.total)
    return JobList(jobs=show_jobs(core, page.jobs), total=page.total)


def _user_ids(core: Core, user: str) -> tuple[str, ...]:
    named = core.store.users.by_login(user)
    return (user,) if named is None else (user, str(named.id))


@router.get("/{job_id}", operation_id="get_job", dependencies=[needs("job.view.*")], responses=UNKNOWN)
def get_job(core: CoreDep, identity: IdentityDep, job_id: str) -> OneJob:
    return OneJob(job=show_jobs(core, [find_job(core, identity, job_id)])[0])


@router.get("/{job_id}/config", operation_id="get_job_config", dependencies=[needs("job.view.*")], responses=UNKNOWN)
def get_job_config(core: CoreDep, identity: IdentityDep, job_id: str) -> JobConfig:
    """What was frozen at submit: every option resolved, and where each value came from."""
    return show_config(core, find_job(core, identity, job_id))


@router.get(
    "/{job_id}/events",
    operation_id="list_job_events",
    dependencies=[needs("job.view.*")],
    response_model=EventPage,
    responses=UNKNOWN,
)
async def list_job_events(
    core: CoreDep,
    identity: IdentityDep,
    job_id: str,
    since_index: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
    types: Annotated[list[str] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    wait: Annotated[float, Query(ge=0, le=60)] = 0,
    images: Images = "inline",
) -> Response:
    wanted = EventFilter.parse(job_id=find_job(core, identity, job_id).job_id, types=types or ())
    return await read_page(core, wanted, since_index=since_index, limit=limit, wait_s=wait, images=images)


@router.get("/{job_id}/metrics", operation_id="get_job_metrics", dependencies=[needs("job.view.*")], responses=UNKNOWN)
def get_job_metrics(
    core: CoreDep,
    identity: IdentityDep,
    job_id: str,
    names: Annotated[list[str] | None, Query(description="Series that are wanted, repeated; all if absent.")] = None,
    since_step: Annotated[int, Query(ge=0)] = 0,
    max_points: Annotated[int, Query(ge=1, le=100_000, description="Of each series.")] = 1000,
) -> JobMetrics:
    """Loss, gradient norm, rate and times of the steps; thinned evenly, the last step always among them."""
    job = find_job(core, identity, job_id)
    return read_metrics(core, job, names=names or (), since_step=since_step, max_points=max_points)


@router.get("/{job_id}/artifacts", operation_id="list_artifacts", dependencies=[needs("job.view.*")], responses=UNKNOWN)
def list_artifacts(core: CoreDep, identity: IdentityDep, job_id: str) -> list[Artifact]:
    """Of what the job's events refer to, the files that are still there."""
    find_job(core, identity, job_id)
    found: dict[str, Artifact] = {}
    kinds = (EventType.VALIDATION_IMAGE, EventType.NOTIFICATION)
    for event in [event for kind in kinds for event in core.store.events.of_type(job_id, kind)]:
        body = event.as_dict()
        for kind, medium in media_of(body):
            artifact_id = str(medium["artifact_id"])
            file = find_artifact(core.settings.jobs_root / job_id, artifact_id)
            if file is not None:
                found[artifact_id] = Artifact(
                    id=artifact_id,
                    kind=kind.removesuffix("s"),
                    mime_type=medium["mime_type"],
                    bytes=file.stat().st_size,
                    step=body.get("data", {}).get("global_step"),
                    url=artifact_url(job_id, artifact_id),
                )
    return list(found.values())


@router.get(
    "/{job_id}/artifacts/{artifact_id}",
    operation_id="get_artifact",
    dependencies=[needs("job.view.*")],
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}}, **error_responses("unknown_job", "not_found")},
)
def get_artifact(core: CoreDep, identity: IdentityDep, job_id: str, artifact_id: str) -> FileResponse:
    find_job(core, identity, job_id)
    file = find_artifact(core.settings.jobs_root / job_id, artifact_id)
    if file is None:
        raise UserError("not_found", f"Job {job_id} has no artifact {artifact_id}.")
    return FileResponse(file)


@router.post(
    "/{job_id}/stop",
    operation_id="stop_job",
    dependencies=[needs("job.cancel.*"), audits("job.stop"), limited(END)],
    status_code=202,
    responses=error_responses("unknown_job", "job_not_running"),
)
def stop_job(core: CoreDep, identity: IdentityDep, job_id: str) -> ControlAnswer:
    return control.stop(core, identity, job_id)


@router.post(
    "/{job_id}/cancel",
    operation_id="cancel_job",
    dependencies=[needs("job.cancel.*"), audits("job.cancel"), limited(END)],
    status_code=202,
    responses=UNKNOWN,
)
def cancel_job(core: CoreDep, identity: IdentityDep, job_id: str, response: Response) -> ControlAnswer:
    """200 when it had ended already."""
    answer, changed = control.cancel(core, identity, job_id)
    response.status_code = 202 if changed else 200
    return answer


PAUSE_ERRORS = error_responses("unknown_job", "job_not_running")


@router.post(
    "/{job_id}/pause",
    operation_id="pause_job",
    dependencies=[needs("job.cancel.*"), audits("job.pause")],
    status_code=202,
    responses=PAUSE_ERRORS,
)
def pause_job(core: CoreDep, identity: IdentityDep, job_id: str) -> ControlAnswer:
    """Save after the current step, give the devices back, wait in the queue until resumed."""
    return control.pause(core, identity, job_id)


@router.post(
    "/{job_id}/resume",
    operation_id="resume_job",
    dependencies=[needs("job.cancel.*"), audits("job.resume")],
    status_code=202,
    responses=PAUSE_ERRORS,
)
def resume_job(core: CoreDep, identity: IdentityDep, job_id: str) -> ControlAnswer:
    """Let a paused job go on from where it was."""
    return control.resume(core, identity, job_id)


STEP_ERRORS = error_responses("no_active_job", "unknown_job", "job_not_stepping")


@router.post(
    "/{job_id}/validation",
    operation_id="validate_job",
    dependencies=[needs("job.cancel.*"), audits("job.validate")],
    responses=STEP_ERRORS,
)
def validate_job(core: CoreDep, identity: IdentityDep, job_id: str) -> RequestAnswer:
    return control.request_step(core, identity, job_id, "validate")


@router.post(
    "/{job_id}/checkpoint",
    operation_id="checkpoint_job",
    dependencies=[needs("job.cancel.*"), audits("job.checkpoint")],
    responses=STEP_ERRORS,
)
def checkpoint_job(core: CoreDep, identity: IdentityDep, job_id: str) -> RequestAnswer:
    return control.request_step(core, identity, job_id, "checkpoint")


@router.post(
    "/{job_id}/retry",
    operation_id="retry_job",
    dependencies=[needs("job.submit"), audits("job.retry"), limited(START)],
    status_code=202,
    responses=error_responses("unknown_job", "job_not_terminal", "gpus_unavailable", "in_flight"),
)
def retry_job(
    core: CoreDep,
    identity: IdentityDep,
    note: AuditDep,
    response: Response,
    job_id: str,
    body: RetryBody | None = None,
    idempotency_key: IdempotencyKey = None,
) -> SubmitAnswer:
    """The same again, as a new job of yours: with the settings that were frozen, and `overrides` over them."""
    body = body or RetryBody()
    claim = build_claim(identity.user_id, idempotency_key, ["retry", job_id, body.model_dump()])
    job = find_job(core, identity, job_id)
    stored = find_answer(core, claim)
    if stored is not None:
        note.nothing_done = True
        response.headers[REPLAYED_HEADER] = "true"
        return SubmitAnswer.model_validate(stored)
    submission = build_from_job(core, identity, job, body, claim)
    note.detail = {"job_id": submission.job_id}
    answer = enqueue(core, submission)
    if claim is not None:
        core.store.claims.store_answer(claim, answer.model_dump())
    return answer


@router.delete(
    "/{job_id}",
    operation_id="delete_job",
    dependencies=[needs("job.delete.*"), audits("job.delete")],
    responses=error_responses("path_outside_root", "unknown_job", "job_not_terminal"),
)
def delete_job(core: CoreDep, identity: IdentityDep, job_id: str, purge_output: bool = False) -> Success:
    """Row, folder and log go; its events stay readable. `purge_output` also removes the output folder of its run."""
    job = find_job(core, identity, job_id, DELETE)
    if not job.status.is_terminal:
        raise UserError("job_not_terminal", f"Job {job_id} is {job.status}.", hint="Cancel it first.")
    output = find_purgeable(core, identity, job) if purge_output else None
    # The row first: a folder without one is removed at the next start, should we die in between.
    if core.store.jobs.delete(job_id):
        core.store.events.forget_position(job_id)
        shutil.rmtree(core.placement.job_dir(job_id).root, ignore_errors=True)
        if output is not None:
            shutil.rmtree(output, ignore_errors=True)
    return Success()
