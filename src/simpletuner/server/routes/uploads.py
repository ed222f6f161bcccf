"""Files over HTTP into the datasets folder: /api/datasets/folders, /upload, /upload/zip (api.md §2.7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from simpletuner.server.audit_trail import AuditDep, AuditNote, audits
from simpletuner.server.core import CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.idempotency import IdempotencyKey, build_claim, once
from simpletuner.server.option_body import OptionBodyDep, option_body_schema
from simpletuner.server.rights import needs
from simpletuner.server.uploads.form import UploadForm, read_boundary, receive_form, told_bytes
from simpletuner.server.uploads.outcome import UploadAnswer, answer_of, find_target, read_on_conflict
from simpletuner.server.uploads.places import Places
from simpletuner.server.uploads.reception import ArchiveSink

router = APIRouter(prefix="/api/datasets", tags=["datasets", "configurations"])

FILES = ("files", "files[]", "file")
TEXTS = ("target_path", "on_conflict")
FOLDER_EXAMPLE = {"parent_path": "/data/datasets", "folder_name": "my-photographs"}
UPLOAD_ERRORS = error_responses(
    "bad_path",
    "path_outside_root",
    "not_found",
    "body_too_large",
    "unsupported_media_type",
    "nothing_stored",
    "body_required",
    "disk_full",
)
SOME = {207: {"model": UploadAnswer, "description": "Some files were stored, others were not: see `results`"}}


class NewFolder(BaseModel):
    success: bool = True
    path: str
    name: str
    error: str | None = None


def _form_schema(files: tuple[str, ...], *, many: bool) -> dict[str, Any]:
    """For the OpenAPI document: the body is read piece by piece, not by the framework."""
    file = {"type": "string", "format": "binary"}
    properties: dict[str, Any] = {
        "target_path": {"type": "string", "description": "Folder under the datasets folder, absolute or relative."},
        "on_conflict": {"type": "string", "enum": ["error", "skip", "overwrite"], "default": "error"},
        **{name: {"type": "array", "items": file} if many else file for name in files},
    }
    schema = {"type": "object", "required": ["target_path"], "properties": properties, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@router.post(
    "/folders",
    operation_id="create_dataset_folder",
    dependencies=[needs("dataset.upload"), audits("dataset.create_folder")],
    status_code=201,
    response_model=NewFolder,
    responses=error_responses(
        "bad_path", "path_outside_root", "not_found", "already_exists", "disk_full", "idempotency_mismatch"
    ),
    openapi_extra=option_body_schema(FOLDER_EXAMPLE, required=True),
)
def create_dataset_folder(
    core: CoreDep,
    identity: IdentityDep,
    response: Response,
    body: OptionBodyDep,
    note: AuditDep,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """A new folder in one that exists; without `parent_path`, in the datasets folder itself."""
    written = body.only("parent_path", "folder_name")
    parent, name = str(written.get("parent_path") or ""), str(written.get("folder_name") or "")
    note.target = f"{parent.rstrip('/')}/{name}" if parent else name

    def create() -> NewFolder:
        path = core.reception.create_folder(parent, name)
        return NewFolder(path=str(path), name=path.name)

    claim = build_claim(identity.user_id, idempotency_key, ["create_dataset_folder", parent, name])
    return once(core, claim, response, note, create)


@router.post(
    "/upload",
    operation_id="upload_dataset_files",
    dependencies=[needs("dataset.upload"), audits("dataset.upload")],
    response_model=UploadAnswer,
    responses={**SOME, **UPLOAD_ERRORS},
    openapi_extra=_form_schema(FILES, many=True),
)
async def upload_dataset_files(core: CoreDep, request: Request, response: Response, note: AuditDep) -> UploadAnswer:
    """Each file is judged by itself: what was not stored is named in `results`, with the reason."""
    reception = core.reception

    async with contextmanager_in_threadpool(reception.stage()) as stage:
        stage.expect(told_bytes(request))
        form = UploadForm(
            read_boundary(request), stage, files=FILES, texts=TEXTS, before_files=_check_fields(reception.places)
        )
        await receive_form(request, form, most_bytes=reception.most_bytes)
        target = find_target(reception.places, form.fields)
        results = await run_in_threadpool(stage.commit, target, read_on_conflict(form.fields))
    answer = await run_in_threadpool(answer_of, results, target, read_on_conflict(form.fields))
    return tell(answer, response, note)


@router.post(
    "/upload/zip",
    operation_id="upload_dataset_archive",
    dependencies=[needs("dataset.upload"), audits("dataset.upload")],
    response_model=UploadAnswer,
    responses={**SOME, **UPLOAD_ERRORS, **error_responses("bad_path", "bad_archive")},
    openapi_extra=_form_schema(("file",), many=False),
)
async def upload_dataset_archive(core: CoreDep, request: Request, response: Response, note: AuditDep) -> UploadAnswer:
    """A zip, unpacked with its folders. One that is unsafe anywhere is refused whole."""
    reception = core.reception

    async with contextmanager_in_threadpool(reception.stage()) as stage:
        stage.expect(told_bytes(request))
        sink = ArchiveSink(stage.folder)
        form = UploadForm(
            read_boundary(request), sink, files=("file",), texts=TEXTS, before_files=_check_fields(reception.places)
        )
        await receive_form(request, form, most_bytes=reception.most_bytes)
        target, on_conflict = find_target(reception.places, form.fields), read_on_conflict(form.fields)
        results = await run_in_threadpool(reception.store_archive, sink.archive, target, on_conflict)
    answer = await run_in_threadpool(answer_of, results, target, on_conflict)
    return tell(answer, response, note)


def _check_fields(places: Places) -> Callable[[Mapping[str, str]], None]:
    """Fields usually come first; what is wrong with them is told before gigabytes are received."""

    def check(fields: Mapping[str, str]) -> None:
        read_on_conflict(fields)
        if "target_path" in fields:
            find_target(places, fields)

    return check


def tell(answer: UploadAnswer, response: Response, note: AuditNote) -> UploadAnswer:
    """Sets the status, and what the audit says."""
    response.status_code = 207 if answer.errors else 200
    note.target = answer.target_path
    note.detail = {"stored": answer.files_uploaded, "skipped": answer.files_skipped, "errors": answer.errors}
    return answer
