"""Workers dial in here (api.md §2.11, §5), each with its token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

import simpletuner
from simpletuner.errors import UserError
from simpletuner.events import utc_now
from simpletuner.server.accounts import hash_secret
from simpletuner.server.core import Core, CoreDep
from simpletuner.server.dispatch import job_messages
from simpletuner.server.errors import error_responses
from simpletuner.server.rights import agents
from simpletuner.server.routes.admin_workers import Labels, Name
from simpletuner.server.streams import SSE_HEADERS
from simpletuner.server.worker_identity import WorkerDep, WorkerToken, bad_token, check_self
from simpletuner.store.workers import WorkerRow

router = APIRouter(prefix="/api/workers", tags=["workers"])
ERRORS = error_responses("unauthenticated", "permission_denied")
PING_S = 15.0
Gigabytes = Annotated[float, Field(ge=0, le=2**20, allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class GpuInfo(_Body):
    """`vram_gb` is of each."""

    name: str = Field(max_length=128)
    count: int = Field(ge=1, le=1024)
    vram_gb: Gigabytes = 0.0
    driver: str | None = Field(default=None, max_length=64)
    accelerator: str = Field(default="cpu", max_length=32)


class HeldLease(_Body):
    job_id: str = Field(max_length=64)
    epoch: int = Field(ge=1)
    journal_offset: int = Field(default=0, ge=0)
    alive: bool = True


class Registration(_Body):
    name: Name
    gpu_info: GpuInfo
    persistent: bool = False
    labels: Labels = Field(default_factory=dict[str, str])
    version: str = Field(max_length=32)
    leases: list[HeldLease] = Field(default_factory=list[HeldLease], max_length=100)


class LeaseVerdict(BaseModel):
    job_id: str
    epoch: int
    verdict: Literal["continue", "abandon"]


class Registered(BaseModel):
    worker_id: str
    sse_url: str
    heartbeat_s: float
    lease_s: float
    leases: list[LeaseVerdict]


class Heartbeat(_Body):
    worker_id: str = Field(max_length=64)
    status: Literal["idle", "busy"]
    gpu_utilization: float | None = Field(default=None, ge=0, le=100)
    vram_used_gb: Gigabytes | None = None


class Leaving(_Body):
    worker_id: str = Field(max_length=64)


class Done(BaseModel):
    success: bool = True


class Messages(BaseModel):
    messages: list[dict[str, Any]]


@router.post(
    "/register",
    operation_id="register_worker",
    dependencies=[agents()],
    responses={**ERRORS, **error_responses("already_exists", "version_mismatch")},
)
async def register(core: CoreDep, worker: WorkerDep, body: Registration) -> Registered:
    """Again after each start. The server's name for it is the one that it was given last."""
    return await run_in_threadpool(_register, core, worker, body)


def _register(core: Core, worker: WorkerRow, body: Registration) -> Registered:
    if body.version != simpletuner.__version__:
        message = f"The worker is version {body.version}, the server {simpletuner.__version__}."
        raise UserError("version_mismatch", message, hint="Install the server's version on the worker.")
    core.store.workers.change(
        worker.worker_id,
        name=body.name,
        worker_type="persistent" if body.persistent else worker.worker_type,
        told_labels=body.labels,
        gpu_info=body.gpu_info.model_dump(),
        version=body.version,
        connected_at=utc_now(),
        last_heartbeat=utc_now(),
    )
    core.fleet.registered(worker.worker_id)
    core.supervisor.replan()
    return Registered(
        worker_id=worker.worker_id,
        sse_url=f"/api/workers/stream?worker_id={worker.worker_id}",
        heartbeat_s=core.settings.timers.heartbeat_s,
        lease_s=core.settings.timers.lease_s,
        leases=[_verdict(core, worker, held) for held in body.leases],
    )


def _verdict(core: Core, worker: WorkerRow, held: HeldLease) -> LeaseVerdict:
    """`continue` only while the lease is live."""
    assignment = core.store.assignments.get(held.job_id)
    holds = (
        assignment is not None
        and (assignment.worker_id, assignment.epoch, assignment.state) == (worker.worker_id, held.epoch, "taken")
        and core.leases.is_alive(held.job_id, held.epoch)
    )
    return LeaseVerdict(job_id=held.job_id, epoch=held.epoch, verdict="continue" if holds else "abandon")


@router.get("/queue", operation_id="poll_worker", dependencies=[agents()], responses=ERRORS)
async def poll(
    core: CoreDep,
    worker: WorkerDep,
    worker_id: Annotated[str, Query(max_length=64)],
    wait: Annotated[float, Query(ge=0, le=20)] = 0,
    x_worker_token: WorkerToken = None,
) -> Messages:
    """`job_submit`, `drain`, `shutdown`: at once where there is one, else after `wait` seconds."""
    check_self(worker, worker_id)
    _open(core, worker_id)
    with core.fleet.bell.listen(worker_id) as rung:
        messages = await run_in_threadpool(_messages, core, worker_id, x_worker_token)
        if not messages:
            await _wait(rung, wait)
            messages = await run_in_threadpool(_messages, core, worker_id, x_worker_token)
    return Messages(messages=messages)


@router.get(
    "/stream",
    operation_id="stream_worker",
    dependencies=[agents()],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **ERRORS},
)
async def stream(
    core: CoreDep,
    worker: WorkerDep,
    worker_id: Annotated[str, Query(max_length=64)],
    x_worker_token: WorkerToken = None,
) -> StreamingResponse:
    """The same as server-sent events, with a `ping` each 15 seconds."""
    check_self(worker, worker_id)
    frames = _frames(core, worker_id, x_worker_token)
    return StreamingResponse(frames, media_type="text/event-stream", headers=SSE_HEADERS)


async def _frames(core: Core, worker_id: str, token: str | None) -> AsyncGenerator[str]:
    """That they can be sent shows nothing: a machine without its net is found dead by its silence, not by this."""
    _open(core, worker_id)
    with core.fleet.bell.listen(worker_id) as rung:
        while not core.fleet.bell.is_closed:
            try:
                messages = await run_in_threadpool(_messages, core, worker_id, token)
            except UserError:
                return
            for message in messages or [{"type": "ping"}]:
                yield f"event: {message['type']}\ndata: {json.dumps(message)}\n\n"
            if any(message["type"] == "shutdown" for message in messages):
                return
            await _wait(rung, PING_S)
            rung.clear()


async def _wait(rung: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await rung.wait()


def _open(core: Core, worker_id: str) -> None:
    core.fleet.asks(worker_id)
    core.supervisor.wake()


def _messages(core: Core, worker_id: str, token: str | None) -> list[dict[str, Any]]:
    """Raises UserError `invalid_credentials` where the worker was given another token meanwhile."""
    worker = core.store.workers.of_token(hash_secret(token or ""))
    if worker is None:
        if core.store.workers.get(worker_id) is not None:
            raise bad_token()
        return [{"type": "shutdown"}]
    drain = [{"type": "drain"}] if worker.draining and core.fleet.tell_drain(worker_id) else []
    return drain + job_messages(core, worker_id)


@router.post("/heartbeat", operation_id="beat_worker", dependencies=[agents()], responses=ERRORS)
def heartbeat(core: CoreDep, worker: WorkerDep, body: Heartbeat) -> Done:
    """The machine lives; it renews no lease."""
    check_self(worker, body.worker_id)
    core.fleet.beat(body.worker_id, utilization=body.gpu_utilization, used_gb=body.vram_used_gb)
    return Done()


@router.post("/disconnect", operation_id="disconnect_worker", dependencies=[agents()], responses=ERRORS)
def disconnect(core: CoreDep, worker: WorkerDep, body: Leaving) -> Done:
    check_self(worker, body.worker_id)
    core.store.workers.change(body.worker_id, connected_at=None)
    core.fleet.left(body.worker_id)
    core.supervisor.wake()
    return Done()
