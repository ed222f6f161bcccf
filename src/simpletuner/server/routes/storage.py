"""Files of a job on a worker, to and from its runner (api.md §2.11), under its job token.

`inputs.json` lists what the job needs and `inputs/<place>/<path>` is one of those files; `output/<path>` and
`artifacts/<name>` are what it made. `outputs.json` puts the former into the job's output folder, once all is there.
"""

from __future__ import annotations

import os
from concurrent.futures import wait
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from simpletuner.errors import UserError
from simpletuner.jobs.inputs import locate
from simpletuner.jobs.storage import Outputs
from simpletuner.server.core import Core, CoreDep
from simpletuner.server.errors import error_responses
from simpletuner.server.lease_holder import Holder, HolderDep
from simpletuner.server.rights import agents
from simpletuner.server.uploads.form import read_batches
from simpletuner.server.uploads.sessions import CONTENT_RANGE

router = APIRouter(prefix="/api/cloud/storage/{job_id}", tags=["workers"])
ERRORS = error_responses("bad_path", "unauthenticated", "permission_denied", "unknown_job", "stale_lease")
PUT_ERRORS = error_responses(
    "bad_path", "unauthenticated", "permission_denied", "unknown_job", "stale_lease", "offset_mismatch", "disk_full"
)
LISTING_S = 2.0
"""So long an answer waits for the list of inputs: most are short."""
Epoch = Annotated[int, Query(ge=1)]


class Stored(BaseModel):
    """`ETag` is the SHA-256; null while bytes are missing, of which `next_offset` is the first."""

    ETag: str | None
    Key: str
    Bucket: str
    next_offset: int


class Published(BaseModel):
    """`missing`: files that must be sent first; nothing has changed while there are any."""

    success: bool
    missing: list[str]


class InputProgress(BaseModel):
    hashed_bytes: int
    total_bytes: int


class InputListing(BaseModel):
    """By place; each file is `{path, bytes, sha256, mtime_ns}`."""

    inputs: dict[str, list[dict[str, Any]]]


@router.get(
    "/inputs.json",
    operation_id="list_inputs",
    dependencies=[agents()],
    responses={202: {"model": InputProgress, "description": "Still being listed: ask again."}, **ERRORS},
)
def list_inputs(core: CoreDep, holder: HolderDep, epoch: Epoch) -> InputListing:
    holder.check_epoch(epoch)
    asked = core.inputs.ask(holder.job, epoch)
    wait([asked.listing], timeout=LISTING_S)
    if not asked.listing.done():
        progress = asked.index.progress
        body = InputProgress(hashed_bytes=progress.done, total_bytes=progress.total)
        return JSONResponse(body.model_dump(), 202)  # pyright: ignore[reportReturnType]
    listing = asked.listing.result()
    return InputListing(inputs={name: [asdict(file) for file in files] for name, files in listing.items()})


@router.get(
    "/inputs/{place}/{path:path}",
    operation_id="get_input",
    dependencies=[agents()],
    response_class=FileResponse,
    responses=error_responses("unauthenticated", "permission_denied", "not_found", "unknown_job", "stale_lease"),
)
def get_input(core: CoreDep, holder: HolderDep, place: str, path: str, epoch: Epoch) -> FileResponse:
    """Answers `Range`. `path` is empty for a place that is one file."""
    holder.check_epoch(epoch)
    found = locate(core.inputs.ask(holder.job, epoch).places, place, path)
    if found is None or not found.is_file():
        raise UserError("not_found", f"The job has no input {place}/{path}.")
    return FileResponse(found, media_type="application/octet-stream")


@router.put("/outputs.json", operation_id="publish_outputs", dependencies=[agents()], responses=PUT_ERRORS)
def publish_outputs(core: CoreDep, holder: HolderDep, epoch: Epoch, outputs: Outputs) -> Published:
    holder.check_epoch(epoch)
    missing = holder.storage.missing(outputs)
    if not missing:
        _publish(core, holder, outputs)
    return Published(success=not missing, missing=missing)


def _publish(core: Core, holder: Holder, outputs: Outputs) -> None:
    limit = int(holder.job.read_config()["config"].get("checkpoints_total_limit") or 0)
    # Under this lock no lease can be found over and the job given to somebody else.
    with core.supervisor.exclusive():
        holder.check_lease(core)
        holder.storage.publish(outputs, checkpoint_limit=limit)


@router.head("/{path:path}", operation_id="head_stored", dependencies=[agents()], responses=ERRORS)
def head_stored(holder: HolderDep, path: str, epoch: Epoch) -> Response:
    """`Upload-Offset` is the next byte to send, `Upload-Complete` whether that is all."""
    holder.check_epoch(epoch)
    offset, complete = holder.storage.received(path)
    return Response(headers={"Upload-Offset": str(offset), "Upload-Complete": "?1" if complete else "?0"})


@router.put(
    "/{path:path}",
    operation_id="put_stored",
    dependencies=[agents()],
    responses=PUT_ERRORS,
    openapi_extra={
        "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def put_stored(
    core: CoreDep,
    holder: HolderDep,
    request: Request,
    path: str,
    epoch: Epoch,
    content_range: Annotated[str, Header(max_length=80)],
    x_content_sha256: Annotated[str, Header(pattern=r"^[0-9a-f]{64}$")],
) -> Stored:
    """The bytes of `Content-Range: bytes <first>-<last>/<all>`; of an empty file `bytes 0-0/0` without any."""
    holder.check_epoch(epoch)
    holder.check_lease(core)
    match = CONTENT_RANGE.fullmatch(content_range)
    if match is None or match[1] is None or match[3] == "*":
        raise UserError("invalid_field", "Content-Range is bytes <first>-<last>/<all>.", pointer="/Content-Range")
    first, total = int(match[1]), int(match[3])
    handle = await run_in_threadpool(holder.storage.open, path, first)
    try:
        received = first + await _receive(request, handle, total - first)
    finally:
        os.close(handle)
    if received < total:
        return Stored(ETag=None, Key=path, Bucket=holder.job.root.name, next_offset=received)
    await run_in_threadpool(holder.storage.finish, path, total, x_content_sha256)
    return Stored(ETag=x_content_sha256, Key=path, Bucket=holder.job.root.name, next_offset=total)


async def _receive(request: Request, handle: int, most: int) -> int:
    """Whatever arrived, counts. Raises UserError `invalid_field` for more than was announced."""
    received = 0
    try:
        async for batch in read_batches(request):
            if received + len(batch) > most:
                raise UserError("invalid_field", "More came than Content-Range says.", pointer="/Content-Range")
            received += await run_in_threadpool(_write, handle, batch)
    except ClientDisconnect as error:
        raise UserError("invalid_field", "The runner went away within a part.") from error
    return received


def _write(handle: int, content: bytes) -> int:
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left) :]
    return len(content)
