"""Uploads in parts, which go on after a broken connection or a restart: /api/datasets/upload/sessions (api.md §2.7)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from simpletuner.errors import UserError
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.option_body import OptionBodyDep, option_body_schema
from simpletuner.server.rights import needs
from simpletuner.server.routes.uploads import SOME, tell
from simpletuner.server.uploads.form import read_batches, too_large
from simpletuner.server.uploads.outcome import UploadAnswer, answer_of
from simpletuner.server.uploads.sessions import ByteRange, PartWriter, parse_range
from simpletuner.server.uploads.stage import OnConflict

router = APIRouter(prefix="/api/datasets/upload/sessions", tags=["datasets"])

EXAMPLE = {"target_path": "my-photographs", "name": "all.zip", "bytes": 2147483648}


class NewUpload(BaseModel):
    model_config = ConfigDict(extra="forbid")

    target_path: str
    name: str = Field(min_length=1)
    """Below the target. A `.zip` is unpacked."""
    bytes: int = Field(ge=0, le=2**60)
    sha256: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    """Of the whole; hexadecimal."""
    on_conflict: OnConflict = "error"


class UploadBegun(BaseModel):
    upload_id: str
    offset: int


class UploadProgress(BaseModel):
    offset: int
    """Bytes that have arrived."""


@router.post(
    "",
    operation_id="create_upload",
    dependencies=[needs("dataset.upload"), audits("dataset.create_upload")],
    status_code=201,
    responses=error_responses(
        "bad_path", "path_outside_root", "not_found", "body_too_large", "nothing_stored", "disk_full"
    ),
    openapi_extra=option_body_schema(EXAMPLE, required=True),
)
def create_upload(core: CoreDep, identity: IdentityDep, body: OptionBodyDep, note: AuditDep) -> UploadBegun:
    """Kept for a week after its last part."""
    try:
        wanted = NewUpload.model_validate(body.only(*NewUpload.model_fields))
    except ValidationError as error:
        raise RequestValidationError([item | {"loc": ("body", *item["loc"])} for item in error.errors()]) from error
    reception = core.reception
    if wanted.bytes > reception.most_bytes:
        raise too_large(reception.most_bytes, "")
    session = reception.sessions.create(
        wanted.target_path, wanted.name, wanted.bytes, wanted.sha256, wanted.on_conflict, identity.user_id
    )
    note.target, note.detail = wanted.target_path, {"name": wanted.name, "upload_id": session.upload_id}
    return UploadBegun(upload_id=session.upload_id, offset=0)


@router.head(
    "/{upload_id}",
    operation_id="head_upload",
    dependencies=[needs("dataset.upload")],
    response_class=Response,
    responses=error_responses("not_found"),
)
def head_upload(core: CoreDep, identity: IdentityDep, upload_id: str) -> Response:
    """`Upload-Offset` is the next byte to send, `Upload-Length` how many there are."""
    sessions = core.reception.sessions
    session = sessions.get(upload_id, identity.user_id)
    headers = {"Upload-Offset": str(sessions.offset(session)), "Upload-Length": str(session.bytes)}
    return Response(headers=headers)


@router.put(
    "/{upload_id}",
    operation_id="put_upload_part",
    dependencies=[needs("dataset.upload"), audits("dataset.upload")],
    response_model=UploadAnswer | UploadProgress,
    responses={
        **SOME,
        **error_responses(
            "bad_path",
            "bad_archive",
            "path_outside_root",
            "not_found",
            "offset_mismatch",
            "in_flight",
            "nothing_stored",
            "disk_full",
        ),
    },
    openapi_extra={
        "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def put_upload_part(
    core: CoreDep,
    identity: IdentityDep,
    request: Request,
    response: Response,
    upload_id: str,
    note: AuditDep,
    content_range: Annotated[str | None, Header(max_length=80)] = None,
) -> UploadAnswer | UploadProgress:
    """The next bytes. After the last ones it answers as `/upload` does, or as `/upload/zip` for a `.zip`.

    `Content-Range: bytes */<all>` without a body stores what has arrived whole but could not be stored then.
    """
    reception = core.reception
    session = await run_in_threadpool(reception.sessions.get, upload_id, identity.user_id)
    part = parse_range(content_range, session)
    if part is not None:
        writer = await run_in_threadpool(reception.sessions.open, session, part.first)
        try:
            await _receive_part(request, writer, part)
        finally:
            await run_in_threadpool(writer.close)
    offset = await run_in_threadpool(reception.sessions.offset, session)
    if offset < session.bytes:
        note.target, note.detail = session.target_path, {"name": session.name, "offset": offset}
        return UploadProgress(offset=offset)
    results, target = await run_in_threadpool(reception.store_session, session)
    answer = await run_in_threadpool(answer_of, results, target, session.on_conflict)
    return tell(answer, response, note)


async def _receive_part(request: Request, writer: PartWriter, part: ByteRange) -> None:
    """Whatever arrived, counts. Raises UserError `invalid_field` where it is not as much as was announced."""
    left = part.num_bytes
    try:
        async for batch in read_batches(request):
            if len(batch) > left:
                message = f"The part is longer than the {part.num_bytes} bytes of its Content-Range."
                raise UserError("invalid_field", message, pointer="/Content-Range")
            await run_in_threadpool(writer.write, batch)
            left -= len(batch)
    except ClientDisconnect as error:
        raise UserError("invalid_field", "The client went away within a part.") from error
    if left:
        message = f"The part is {left} bytes shorter than its Content-Range: go on where HEAD says."
        raise UserError("invalid_field", message, pointer="/Content-Range")
