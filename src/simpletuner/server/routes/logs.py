"""What a job printed: /api/jobs/{id}/logs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.open_streams import OpenStream
from simpletuner.server.rights import needs
from simpletuner.server.sight import find_job
from simpletuner.server.streams import HEARTBEAT_S, HeldStream
from simpletuner.store.job_row import JobRow

router = APIRouter(tags=["jobs", "training"])

PAGE_BYTES = 2**20
POLL_S = 0.2


class LogPage(BaseModel):
    job_id: str
    logs: str
    next_offset: int
    eof: bool


@router.get(
    "/{job_id}/logs",
    operation_id="get_job_logs",
    dependencies=[needs("job.view.*")],
    responses=error_responses("unknown_job"),
)
def get_job_logs(
    core: CoreDep,
    identity: IdentityDep,
    job_id: str,
    offset: Annotated[int | None, Query(ge=0, le=2**63 - 1, description="Byte to begin at.")] = None,
    tail: Annotated[int | None, Query(ge=1, le=10_000, description="Only the last lines.")] = None,
    format: Literal["json", "text"] = "json",
) -> Response:
    """At most 1 MiB an answer; go on at `next_offset`."""
    page = read_log(core, find_job(core, identity, job_id), offset, tail)
    if format == "text":
        return PlainTextResponse(page.logs, headers={"X-Next-Offset": str(page.next_offset)})
    return Response(page.model_dump_json(), media_type="application/json")


def read_log(core: Core, job: JobRow, offset: int | None, tail: int | None) -> LogPage:
    is_over = job.status.is_terminal
    path = core.placement.job_dir(job.job_id).log_path
    size = path.stat().st_size if path.exists() else 0
    start = max(0, size - PAGE_BYTES) if tail is not None and offset is None else min(offset or 0, size)
    content = _read(path, start)
    if tail is not None:
        content = b"".join(content.splitlines(keepends=True)[-tail:])
    end = size if tail is not None and offset is None else start + len(content)
    return LogPage(
        job_id=job.job_id, logs=content.decode(errors="replace"), next_offset=end, eof=is_over and end >= size
    )


@router.get(
    "/{job_id}/logs/stream",
    operation_id="stream_job_logs",
    dependencies=[needs("job.view.*")],
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}, **error_responses("unknown_job", "too_many_streams")},
)
def stream_job_logs(
    core: CoreDep, identity: IdentityDep, job_id: str, offset: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0
) -> StreamingResponse:
    """`line` for each line, `done` at the job's end. The id of a line is the offset after it."""
    find_job(core, identity, job_id)
    stream = core.accounts.streams.open(identity)
    return HeldStream(_follow_log(core, job_id, offset, stream), stream)


async def _follow_log(core: Core, job_id: str, offset: int, stream: OpenStream) -> AsyncGenerator[str]:
    path = core.placement.job_dir(job_id).log_path
    quiet_s = 0.0
    while not core.feed.is_closed and not stream.ended:
        # Asked before the file is read: what an ended job printed is all there.
        job = await asyncio.to_thread(core.store.jobs.get, job_id)
        is_over = job is None or job.status.is_terminal
        content = await asyncio.to_thread(_read, path, offset)
        whole = content if is_over else content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines(keepends=True):
            offset += len(line)
            yield f"id: {offset}\nevent: line\ndata: {json.dumps(line.decode(errors='replace').rstrip())}\n\n"
        if is_over and not whole:
            status = job.status if job is not None else "deleted"
            yield f"event: done\ndata: {json.dumps({'job_id': job_id, 'status': status})}\n\n"
            return
        if not whole:
            await asyncio.sleep(POLL_S)
            quiet_s += POLL_S
            if quiet_s >= HEARTBEAT_S:
                quiet_s = 0.0
                yield ": hb\n\n"


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(PAGE_BYTES)
    except FileNotFoundError:
        return b""
