"""What the runner of a job on a worker says to the server (api.md §2.11, §5), under its job token."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from simpletuner.errors import UserError
from simpletuner.job import CommandReader, ExitRecord
from simpletuner.jobs.shipment import size_of
from simpletuner.server.core import Core, CoreDep
from simpletuner.server.errors import error_responses
from simpletuner.server.lease_holder import Holder, HolderDep, stale
from simpletuner.server.rights import agents

router = APIRouter(prefix="/api/workers/job", tags=["workers"])
STALE = error_responses("unauthenticated", "permission_denied", "unknown_job", "stale_lease")
MOST_WAIT_S = 20.0


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    epoch: int = Field(ge=1)


class Ack(_Body):
    accepted: bool
    reason: str | None = Field(default=None, max_length=1000)


class Acked(BaseModel):
    """`journal_offset` and `log_offset`: where what the runner sends begins."""

    success: bool = True
    expires_in_s: float = 0.0
    journal_offset: int = 0
    log_offset: int = 0


class Renewal(_Body):
    wait: float = Field(default=0.0, ge=0, le=MOST_WAIT_S)


class Renewed(BaseModel):
    """`commands`: all of this attempt, oldest first; those known by their `request_id` are to be ignored."""

    success: bool = True
    expires_in_s: float
    commands: list[dict[str, Any]]


class Report(_Body):
    status: Literal["ended"]
    exit: dict[str, Any]


class Done(BaseModel):
    success: bool = True


class Received(BaseModel):
    next_offset: int


@router.post("/{job_id}/ack", operation_id="ack_job", dependencies=[agents()], responses=STALE)
async def ack(core: CoreDep, holder: HolderDep, job_id: str, body: Ack) -> Acked:
    """Accepting takes the lease; a repeat of it is answered alike. A refusal puts the job back into the queue."""
    return await run_in_threadpool(_ack, core, holder, job_id, body)


def _ack(core: Core, holder: Holder, job_id: str, body: Ack) -> Acked:
    holder.check_epoch(body.epoch)
    if not body.accepted:
        if core.leases.is_held(job_id):
            raise stale(job_id, body.epoch)
        core.remote.refuse(job_id, body.reason or "it did not say why.")
        core.supervisor.wake()
        return Acked()
    if not core.leases.take(job_id, body.epoch):
        raise stale(job_id, body.epoch)
    job = holder.job
    sizes = {"journal_start": size_of(job.journal_path), "log_start": size_of(job.log_path)}
    if holder.assignment.state == "offered" and core.store.assignments.take(job_id, body.epoch, **sizes):
        holder.storage.begin()
        core.supervisor.wake()
    taken = core.store.assignments.get(job_id)
    if taken is None or taken.epoch != body.epoch or taken.state != "taken":
        raise stale(job_id, body.epoch)
    return Acked(
        expires_in_s=core.leases.remaining_s(job_id),
        journal_offset=taken.journal_start or 0,
        log_offset=taken.log_start or 0,
    )


@router.post("/{job_id}/lease", operation_id="renew_lease", dependencies=[agents()], responses=STALE)
async def renew(core: CoreDep, holder: HolderDep, job_id: str, body: Renewal) -> Renewed:
    """Renews when it comes in; answers at once where there is a new command, else after `wait` seconds."""
    holder.check_epoch(body.epoch)
    if not core.leases.renew(job_id, body.epoch):
        raise stale(job_id, body.epoch)
    reader = CommandReader(holder.job)
    with core.remote.bell.listen(job_id) as rung:
        commands = reader.read()
        told = core.remote.num_told(job_id)
        if len(commands) <= told:
            with suppress(TimeoutError):
                async with asyncio.timeout(body.wait):
                    await rung.wait()
            commands += reader.read()
    core.remote.note_told(job_id, len(commands))
    shown = [command.model_dump() for command in commands]
    return Renewed(expires_in_s=core.leases.remaining_s(job_id), commands=shown)


@router.post("/{job_id}/status", operation_id="report_job", dependencies=[agents()], responses=STALE)
async def report(core: CoreDep, holder: HolderDep, job_id: str, body: Report) -> Done:
    """`ended` comes last, with how: everything else of the job has been sent by then."""
    holder.check_epoch(body.epoch)
    await run_in_threadpool(_report, core, holder, body)
    return Done()


def _report(core: Core, holder: Holder, body: Report) -> None:
    job_id = holder.assignment.job_id
    with core.supervisor.exclusive():
        holder.check_lease(core)
        job = core.job(job_id)
        try:
            record = ExitRecord.model_validate(body.exit | {"attempt": job.attempt})
        except ValueError as error:
            raise UserError("invalid_field", f"This is no exit: {error}", pointer="/exit") from error
        holder.job.write_exit(record)
    core.supervisor.wake()


@router.put("/{job_id}/journal", operation_id="put_journal", dependencies=[agents()], responses=STALE)
async def put_journal(
    core: CoreDep, holder: HolderDep, request: Request, epoch: int, offset: Annotated[int, Query(ge=0)]
) -> Received:
    """Whole lines of the job's journal, from byte `offset` of the server's on."""
    return await _append(core, holder, request, holder.job.journal_path, epoch, offset, start=_start(holder)[0])


@router.put("/{job_id}/log", operation_id="put_log", dependencies=[agents()], responses=STALE)
async def put_log(
    core: CoreDep, holder: HolderDep, request: Request, epoch: int, offset: Annotated[int, Query(ge=0)]
) -> Received:
    """Bytes of the job's log, from byte `offset` of the server's on."""
    return await _append(core, holder, request, holder.job.log_path, epoch, offset, start=_start(holder)[1])


def _start(holder: Holder) -> tuple[int, int]:
    return holder.assignment.journal_start or 0, holder.assignment.log_start or 0


async def _append(
    core: Core, holder: Holder, request: Request, path: Path, epoch: int, offset: int, *, start: int
) -> Received:
    holder.check_epoch(epoch)
    content = await request.body()
    if path == holder.job.journal_path and content and not content.endswith(b"\n"):
        raise UserError("invalid_field", "A journal is sent in whole lines.", pointer="/body")
    append = partial(core.shipments.append, path, content, offset, start=start, check=partial(holder.check_lease, core))
    next_offset = await run_in_threadpool(append)
    core.supervisor.wake()
    return Received(next_offset=next_offset)
