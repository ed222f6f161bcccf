"""The queue: /api/queue (api.md §2.9)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from simpletuner.errors import UserError
from simpletuner.events import AnyData, Event, EventType
from simpletuner.job import TERMINAL, JobStatus
from simpletuner.jobs.placement import WAITING
from simpletuner.jobs.submit import GpusUnavailable
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.errors import error_responses, request_id_of
from simpletuner.server.idempotency import REPLAYED_HEADER, IdempotencyKey, build_claim, find_answer
from simpletuner.server.identity import Identity
from simpletuner.server.queue_submit import (
    RejectedAnswer,
    SubmitAnswer,
    SubmitBody,
    build_from_environment,
    enqueue,
    predict,
    rejected_whole,
)
from simpletuner.server.queue_view import (
    CANCEL,
    OwnQueue,
    QueueLimits,
    QueueList,
    QueuePosition,
    QueueStats,
    find_entry,
    owner_seen,
    priority_now,
    read_limits,
    show_entries,
    show_own,
    show_position,
    show_stats,
    unfinished,
)
from simpletuner.server.rate_limit import END, START
from simpletuner.server.rights import limited, needs
from simpletuner.store.job_row import JobQuery, JobRow

router = APIRouter(prefix="/api/queue", tags=["queue", "training"])

UNKNOWN = error_responses("unknown_job")
STATE_ERRORS = error_responses("unknown_job", "job_not_waiting")
AtLeastOne = Annotated[int | None, Field(ge=1, le=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PriorityBody(_Body):
    priority: Annotated[int | None, Field(ge=0, le=50)]
    """null: that of the owner's level again."""


class RejectBody(_Body):
    reason: Annotated[str | None, Field(max_length=500)] = None


class LimitsBody(_Body):
    """What is absent stays; null is unlimited."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"local_gpu_max_concurrent": 6}})

    local_gpu_max_concurrent: AtLeastOne = None
    local_job_max_concurrent: AtLeastOne = None
    max_concurrent: Annotated[int, Field(ge=1, le=100)] = 5
    user_max_concurrent: AtLeastOne = None
    enable_fair_share: bool = False


class QueueAnswer(BaseModel):
    success: bool = True
    job_id: str
    status: str


class PriorityAnswer(QueueAnswer):
    previous_effective_priority: int
    new_effective_priority: int


class LimitsAnswer(QueueLimits):
    success: bool = True


@router.get("", operation_id="list_queue", dependencies=[needs("queue.view")])
def list_queue(
    core: CoreDep,
    identity: IdentityDep,
    response: Response,
    status: Annotated[list[JobStatus] | None, Query()] = None,
    include_completed: bool = False,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> QueueList:
    """What runs, then what waits in the order in which it is served, then what has ended, the newest first."""
    owner = owner_seen(identity)
    waits = core.placement.waits()
    rows = unfinished(core, waits, owner)
    wanted = [row for row in rows if not status or row.status in status]
    shown = wanted[offset : offset + limit]
    ended = tuple(TERMINAL if not status else TERMINAL.intersection(status))
    total = len(wanted)
    if ended and (status or include_completed):
        more = JobQuery(
            statuses=ended,
            seen_user_id=owner,
            limit=limit - len(shown),
            offset=max(0, offset - len(wanted)),
        )
        page = core.store.jobs.find(more)
        shown += page.jobs
        total += page.total
    response.headers["X-Total-Count"] = str(total)
    return QueueList(
        entries=show_entries(shown, waits),
        total_pending=sum(row.status in WAITING for row in rows),
        total_running=sum(row.status.is_active for row in rows),
    )


@router.get("/stats", operation_id="get_queue_stats", dependencies=[needs("queue.view")])
def get_queue_stats(core: CoreDep, identity: IdentityDep) -> QueueStats:
    return show_stats(core, identity)


@router.get("/me", operation_id="get_own_queue", dependencies=[needs("queue.view")])
def get_own_queue(core: CoreDep, identity: IdentityDep) -> OwnQueue:
    """Your own jobs that wait and run."""
    return show_own(core, identity)


@router.get(
    "/position/{job_id}", operation_id="get_queue_position", dependencies=[needs("queue.view")], responses=UNKNOWN
)
def get_queue_position(core: CoreDep, identity: IdentityDep, job_id: str) -> QueuePosition:
    """The wait is estimated where only running jobs stand in the way, and say when they end."""
    return show_position(core, find_entry(core, identity, job_id))


@router.post(
    "/submit",
    operation_id="submit_job",
    dependencies=[needs("job.submit"), audits("job.submit"), limited(START)],
    status_code=202,
    response_model=SubmitAnswer,
    responses={
        200: {"model": SubmitAnswer, "description": "Of a dry run."},
        **error_responses("unknown_config", "in_flight", "unsupported_target", "path_outside_root"),
        409: {"model": RejectedAnswer, "description": "Conflict: gpus_unavailable, in_flight"},
    },
)
def submit_job(
    core: CoreDep,
    identity: IdentityDep,
    note: AuditDep,
    request: Request,
    body: SubmitBody,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue a stored environment; it starts now where it can. A dry run says what the next real call would come to."""
    key = _one_key(body.idempotency_key, idempotency_key)
    if body.dry_run:
        note.nothing_done = True
        return JSONResponse(_body(predict(core, build_from_environment(core, identity, body, None))), 200)
    asked = body.model_dump(exclude={"idempotency_key"})
    claim = build_claim(identity.user_id, key, ["submit", asked])
    stored = find_answer(core, claim)
    if stored is not None:
        note.nothing_done = True
        return JSONResponse(stored, 202, headers={REPLAYED_HEADER: "true"})
    submission = build_from_environment(core, identity, body, claim)
    note.target, note.detail = submission.job_id, {"environment": submission.config_name}
    try:
        answer = _body(enqueue(core, submission))
    except GpusUnavailable as error:
        return JSONResponse(_body(rejected_whole(error, request_id_of(request.scope))), 409)
    if claim is not None:
        core.store.claims.store_answer(claim, answer)
    return JSONResponse(answer, 202)


def _one_key(in_body: str | None, in_header: str | None) -> str | None:
    if in_body and in_header and in_body != in_header:
        message = "idempotency_key and the header Idempotency-Key differ."
        raise UserError("invalid_field", message, hint="Give one of them.", pointer="/idempotency_key")
    return in_body or in_header


def _body(answer: BaseModel) -> dict[str, Any]:
    return {
        name: value
        for name, value in answer.model_dump(mode="json").items()
        if value is not None or name not in {"dry_run", "hint"}
    }


@router.get("/concurrency", operation_id="get_concurrency", dependencies=[needs("queue.view")])
def get_concurrency(core: CoreDep) -> LimitsAnswer:
    return LimitsAnswer(**read_limits(core).model_dump())


@router.post(
    "/concurrency", operation_id="set_concurrency", dependencies=[needs("queue.manage"), audits("queue.limits")]
)
def set_concurrency(core: CoreDep, note: AuditDep, body: LimitsBody) -> LimitsAnswer:
    """Kept, and in force at once; no running job is stopped."""
    changes = body.model_dump(exclude_unset=True)
    for name, value in changes.items():
        core.store.settings.set(name, value)
    note.target, note.detail = "concurrency", changes
    _announce(core, "Limits of the queue changed", {"change": "limits", **changes})
    return get_concurrency(core)


@router.post(
    "/{job_id}/cancel",
    operation_id="cancel_queued_job",
    dependencies=[needs("queue.cancel.*"), audits("job.cancel"), limited(END)],
    responses=error_responses("unknown_job", "job_not_running"),
)
def cancel_queued_job(core: CoreDep, identity: IdentityDep, job_id: str) -> QueueAnswer:
    """Also of one that runs."""
    job = find_entry(core, identity, job_id, CANCEL)
    if job.status.is_terminal:
        raise UserError("job_not_running", f"Job {job_id} is {job.status}.")
    return QueueAnswer(job_id=job_id, status=core.supervisor.request_end(job_id, "cancel").status)


@router.post(
    "/{job_id}/priority",
    operation_id="set_queue_priority",
    dependencies=[needs("queue.manage"), audits("queue.priority")],
    responses=STATE_ERRORS,
)
def set_queue_priority(
    core: CoreDep, identity: IdentityDep, note: AuditDep, job_id: str, body: PriorityBody
) -> PriorityAnswer:
    before = find_entry(core, identity, job_id)
    if not core.store.jobs.set_priority(job_id, body.priority):
        raise _not_waiting(core.job(job_id))
    after = core.job(job_id)
    note.detail = {"priority": body.priority}
    _announce(core, f"Priority of job {job_id} changed", {"change": "priority", "job_id": job_id})
    return PriorityAnswer(
        job_id=job_id,
        status=after.status,
        previous_effective_priority=priority_now(before),
        new_effective_priority=priority_now(after),
    )


@router.post(
    "/{job_id}/approve",
    operation_id="approve_job",
    dependencies=[needs("queue.approve"), audits("queue.approve")],
    responses=STATE_ERRORS,
)
def approve_job(core: CoreDep, identity: IdentityDep, job_id: str) -> QueueAnswer:
    """Let a blocked job into the queue."""
    _find_blocked(core, identity, job_id)
    return QueueAnswer(job_id=job_id, status=core.supervisor.approve(job_id, identity.name).status)


@router.post(
    "/{job_id}/reject",
    operation_id="reject_job",
    dependencies=[needs("queue.approve"), audits("queue.reject")],
    responses=STATE_ERRORS,
)
def reject_job(
    core: CoreDep, identity: IdentityDep, note: AuditDep, job_id: str, body: RejectBody | None = None
) -> QueueAnswer:
    """End a blocked job before it ran."""
    _find_blocked(core, identity, job_id)
    reason = (body.reason if body else None) or f"Rejected by {identity.name}"
    note.detail = {"reason": reason}
    return QueueAnswer(job_id=job_id, status=core.supervisor.reject(job_id, reason).status)


def _find_blocked(core: Core, identity: Identity, job_id: str) -> JobRow:
    job = find_entry(core, identity, job_id)
    if job.status is not JobStatus.BLOCKED:
        raise UserError("job_not_waiting", f"Job {job_id} is {job.status}: it awaits no approval.")
    return job


def _not_waiting(job: JobRow) -> UserError:
    return UserError("job_not_waiting", f"Job {job.job_id} is {job.status}: it does not wait in the queue.")


def _announce(core: Core, message: str, data: dict[str, Any]) -> None:
    core.store.outbox.put(Event(type=EventType.QUEUE_UPDATED, message=message, data=AnyData.model_validate(data)))
    core.supervisor.replan()
