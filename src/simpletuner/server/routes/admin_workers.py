"""Workers, as admins see and make them (api.md §2.11)."""

from __future__ import annotations

import secrets
import shlex
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from simpletuner.errors import UserError
from simpletuner.server.accounts import hash_secret
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import Core, CoreDep
from simpletuner.server.errors import error_responses
from simpletuner.server.rights import needs
from simpletuner.server.worker_identity import new_worker_token
from simpletuner.store.assignments import Assignment
from simpletuner.store.workers import WorkerRow

router = APIRouter(prefix="/api/admin/workers", tags=["admin-workers", "training"])
MAY = needs("admin.workers")
ERRORS = error_responses("unknown_worker")
Status = Literal["connecting", "idle", "busy", "draining", "quarantined", "offline"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
Labels = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=256)]],
    Field(max_length=50),
]


class WorkerView(BaseModel):
    """`gpu_info` is what the worker said of itself; `labels` what jobs are matched with."""

    worker_id: str
    id: str
    name: str
    worker_type: str
    status: Status
    gpu_name: str | None
    gpu_count: int
    gpu_vram_gb: float | None
    accelerator_type: str | None
    gpu_info: dict[str, Any] | None
    labels: dict[str, str]
    current_job_id: str | None
    lease_epoch: int | None
    last_heartbeat: str | None
    connected_at: str | None
    created_at: str
    connected: bool
    uptime_seconds: float | None
    version: str | None


class WorkerList(BaseModel):
    workers: list[WorkerView]
    total: int


class NewWorker(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Name
    worker_type: Literal["persistent", "ephemeral"] = "persistent"
    labels: Labels = Field(default_factory=dict[str, str])


class MadeWorker(BaseModel):
    """The token is shown this once."""

    worker_id: str
    token: str
    connection_command: str


class WorkerChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    labels: Labels | None = None


class WorkerAnswer(BaseModel):
    success: bool = True
    worker_id: str
    status: Status


class NewToken(BaseModel):
    success: bool = True
    worker_id: str
    token: str
    connection_command: str


@router.get("", operation_id="list_workers", dependencies=[MAY])
def list_workers(
    core: CoreDep,
    response: Response,
    status_filter: Annotated[Status | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> WorkerList:
    """In order of name."""
    live = {assignment.worker_id: assignment for assignment in core.store.assignments.live()}
    shown = [_show(core, worker, live.get(worker.worker_id)) for worker in core.store.workers.all()]
    wanted = [worker for worker in shown if status_filter in {None, worker.status}]
    response.headers["X-Total-Count"] = str(len(wanted))
    return WorkerList(workers=wanted[offset : offset + limit], total=len(wanted))


@router.post(
    "",
    operation_id="create_worker",
    status_code=201,
    dependencies=[MAY, audits("worker.create")],
    responses=error_responses("already_exists"),
)
def create_worker(core: CoreDep, request: Request, body: NewWorker, note: AuditDep) -> MadeWorker:
    worker_id, token = f"w_{secrets.token_hex(6)}", new_worker_token()
    core.store.workers.create(worker_id, body.name, body.worker_type, body.labels, hash_secret(token))
    note.target, note.detail = worker_id, {"name": body.name}
    command = _command(request, token, body.name, persistent=body.worker_type == "persistent")
    return MadeWorker(worker_id=worker_id, token=token, connection_command=command)


@router.patch(
    "/{worker_id}",
    operation_id="change_worker",
    dependencies=[MAY, audits("worker.change")],
    responses={**ERRORS, **error_responses("already_exists")},
)
def change_worker(core: CoreDep, worker_id: str, body: WorkerChange, note: AuditDep) -> WorkerAnswer:
    """`labels` replaces those set at the server; jobs that wait are matched anew at once."""
    _find(core, worker_id)
    changes = body.model_dump(exclude_none=True)
    if changes:
        core.store.workers.change(worker_id, **changes)
    core.supervisor.replan()
    note.target, note.detail = worker_id, changes
    return _answer(core, worker_id)


@router.delete(
    "/{worker_id}",
    operation_id="delete_worker",
    dependencies=[MAY, audits("worker.delete")],
    responses={**ERRORS, **error_responses("job_not_terminal")},
)
def delete_worker(core: CoreDep, worker_id: str, note: AuditDep, force: bool = False) -> WorkerAnswer:
    """With `force` also one that has a job: its lease ends now, and the job goes on elsewhere."""
    _find(core, worker_id)
    note.target, note.detail = worker_id, {"force": force}
    held = core.store.assignments.live(worker_id)
    if held and not force:
        message = f"Worker {worker_id} has job {held[0].job_id}."
        raise UserError("job_not_terminal", message, hint="Drain it and wait, or force it: the job is then retried.")
    for assignment in held:
        core.leases.drop(assignment.job_id)
    core.fleet.forget(worker_id)
    core.supervisor.replan()
    return WorkerAnswer(worker_id=worker_id, status="offline")


@router.post(
    "/{worker_id}/drain", operation_id="drain_worker", dependencies=[MAY, audits("worker.drain")], responses=ERRORS
)
def drain_worker(core: CoreDep, worker_id: str, note: AuditDep) -> WorkerAnswer:
    """It finishes its job and gets no other."""
    note.target = worker_id
    return _set_draining(core, worker_id, draining=True)


@router.post(
    "/{worker_id}/undrain",
    operation_id="undrain_worker",
    dependencies=[MAY, audits("worker.undrain")],
    responses=ERRORS,
)
def undrain_worker(core: CoreDep, worker_id: str, note: AuditDep) -> WorkerAnswer:
    note.target = worker_id
    return _set_draining(core, worker_id, draining=False)


@router.post(
    "/{worker_id}/token", operation_id="renew_token", dependencies=[MAY, audits("worker.token")], responses=ERRORS
)
def renew_token(core: CoreDep, request: Request, worker_id: str, note: AuditDep) -> NewToken:
    """The one that it has is worth nothing from now on; a job that runs has a token of its own."""
    worker = _find(core, worker_id)
    token = new_worker_token()
    core.store.workers.change(worker_id, token_hash=hash_secret(token))
    core.fleet.wake(worker_id)
    note.target = worker_id
    command = _command(request, token, worker.name, persistent=worker.worker_type == "persistent")
    return NewToken(worker_id=worker_id, token=token, connection_command=command)


def _set_draining(core: Core, worker_id: str, *, draining: bool) -> WorkerAnswer:
    _find(core, worker_id)
    core.store.workers.change(worker_id, draining=draining)
    core.fleet.told_anew(worker_id)
    core.supervisor.replan()
    return _answer(core, worker_id)


def _find(core: Core, worker_id: str) -> WorkerRow:
    worker = core.store.workers.get(worker_id)
    if worker is None:
        raise UserError("unknown_worker", f"There is no worker {worker_id}.")
    return worker


def _answer(core: Core, worker_id: str) -> WorkerAnswer:
    return WorkerAnswer(worker_id=worker_id, status=core.fleet.status(_find(core, worker_id)))


def _command(request: Request, token: str, name: str, *, persistent: bool) -> str:
    words = ["simpletuner", "worker", "--orchestrator-url", str(request.base_url).rstrip("/"), "--worker-token", token]
    return shlex.join([*words, "--name", name, *(["--persistent"] if persistent else [])])


def _show(core: Core, worker: WorkerRow, held: Assignment | None) -> WorkerView:
    info = worker.gpu_info or {}
    status = core.fleet.status(worker, busy=held is not None)
    connected = status != "offline"
    since = datetime.fromisoformat(worker.connected_at) if worker.connected_at and connected else None
    return WorkerView(
        worker_id=worker.worker_id,
        id=worker.worker_id,
        name=worker.name,
        worker_type=worker.worker_type,
        status=status,
        gpu_name=info.get("name"),
        gpu_count=worker.num_devices,
        gpu_vram_gb=info.get("vram_gb"),
        accelerator_type=info.get("accelerator"),
        gpu_info=(info | core.fleet.load(worker.worker_id)) if info else None,
        labels=worker.all_labels,
        current_job_id=held.job_id if held else None,
        lease_epoch=held.epoch if held else None,
        last_heartbeat=worker.last_heartbeat,
        connected_at=worker.connected_at,
        created_at=worker.created_at,
        connected=connected,
        uptime_seconds=(datetime.now(UTC) - since).total_seconds() if since else None,
        version=worker.version,
    )
