"""What an upload asks for, and what it is told at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from simpletuner.errors import Problem, UserError
from simpletuner.server.uploads.places import Places
from simpletuner.server.uploads.stage import FileResult, OnConflict, Status
from simpletuner.server.uploads.suggestion import suggest_dataset

MOST_PROBLEMS = 50


class FileOutcome(BaseModel):
    name: str
    status: Status
    reason: str | None
    bytes: int
    code: str | None
    hint: str | None


class UploadAnswer(BaseModel):
    success: bool
    files_uploaded: int
    files_skipped: int
    errors: int
    results: list[FileOutcome]
    target_path: str
    suggested_dataset: dict[str, Any]
    """An entry for a dataset file, with the folder's real path."""
    suggested_conditioning: list[dict[str, Any]]
    """The entries that `suggested_dataset` names in `conditioning_data`."""


def find_target(places: Places, fields: Mapping[str, str]) -> Path:
    """The folder that `target_path` names. Raises UserError `invalid_field` without one, and as `Places.folder`."""
    if "target_path" not in fields:
        hint = "Send the folder that the files go to, for example one made by POST /api/datasets/folders."
        raise UserError("invalid_field", "target_path is missing.", hint=hint, pointer="/target_path")
    return places.folder(fields["target_path"], pointer="/target_path")


def read_on_conflict(fields: Mapping[str, str]) -> OnConflict:
    """Raises UserError `invalid_field`."""
    written = fields.get("on_conflict") or "error"
    for known in get_args(OnConflict):
        if written == known:
            return known
    hint = f"One of {', '.join(get_args(OnConflict))}."
    raise UserError("invalid_field", f"on_conflict cannot be {written[:40]!r}.", hint=hint, pointer="/on_conflict")


def answer_of(results: Sequence[FileResult], target: Path, on_conflict: OnConflict) -> UploadAnswer:
    """Raises UserError `nothing_stored`, with a problem a file; not where everything was there and may stay."""
    stored = sum(result.status == "stored" for result in results)
    skipped = sum(result.status == "skipped" for result in results)
    errors = len(results) - stored - skipped
    if not stored and (errors or on_conflict != "skip"):
        raise _nothing_stored(results)
    suggestion = suggest_dataset(target)
    return UploadAnswer(
        success=not errors,
        files_uploaded=stored,
        files_skipped=skipped,
        errors=errors,
        results=[_show(result) for result in results],
        target_path=str(target),
        suggested_dataset=suggestion.entry,
        suggested_conditioning=suggestion.conditioning,
    )


def _show(result: FileResult) -> FileOutcome:
    return FileOutcome(
        name=result.name,
        status=result.status,
        reason=result.reason,
        bytes=result.num_bytes,
        code=result.code or None,
        hint=result.hint or None,
    )


def _nothing_stored(results: Sequence[FileResult]) -> UserError:
    refused = [result for result in results if result.status != "stored"]
    if not refused:
        hint = "Send them in the fields files, files[] or file."
        return UserError("nothing_stored", "The request holds no files.", hint=hint, pointer="/files")
    problems = [
        Problem(
            code=result.code or "skipped",
            message=f"{result.name}: {result.reason}.",
            hint=result.hint,
            pointer=f"/files/{index}",
        )
        for index, result in enumerate(refused[:MOST_PROBLEMS])
    ]
    return UserError.from_problems(problems, code="nothing_stored")
