"""What is in the datasets folder: /api/datasets/browse, /detect, /thumbnail, /captions, /files (api.md §2.7)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field, RootModel

from simpletuner.errors import UserError
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import CoreDep
from simpletuner.server.errors import error_responses
from simpletuner.server.rights import needs
from simpletuner.server.uploads.caption_edit import CaptionEdit, plan_changes
from simpletuner.server.uploads.contents import (
    draw_thumbnail,
    list_entries,
    list_pictures,
    move_to_trash,
    read_caption,
    write_captions,
)
from simpletuner.server.uploads.suggestion import suggest_dataset

router = APIRouter(prefix="/api/datasets", tags=["datasets"])

PATH_ERRORS = error_responses("bad_path", "path_outside_root", "not_found")
PathQuery = Annotated[str, Query(description="Under the datasets folder, absolute or relative.", max_length=1000)]
Limit = Annotated[int, Query(ge=1, le=500)]
Offset = Annotated[int, Query(ge=0, le=2**31)]
MOST_WORDS = 10_000
MOST_EXAMPLES = 20


class EntryView(BaseModel):
    name: str
    path: str
    kind: str = Field(examples=["folder", "image", "text", "other"])
    bytes: int
    modified_at: datetime


class Browsed(BaseModel):
    path: str
    absolute_path: str
    parent: str | None
    """None for the datasets folder itself."""
    entries: list[EntryView]
    total: int


class Detected(BaseModel):
    path: str
    suggested_dataset: dict[str, Any]
    suggested_conditioning: list[dict[str, Any]]
    counts: dict[str, int]
    """Files by kind."""
    captioned: int
    sizes: dict[str, int]
    """Of some pictures: `<width>x<height>` → how many."""


class CaptionList(BaseModel):
    path: str
    captions: dict[str, str | None]
    """By the picture's path; null where it has no caption file."""
    total: int


class CaptionChanges(RootModel[dict[str, str]]):
    """By the picture's path, as GET tells it."""

    root: dict[str, str] = Field(min_length=1, examples=[{"my-photographs/0001.png": "a red bicycle"}])


class Changed(BaseModel):
    changed: int


class CaptionEditRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: str = Field("", max_length=1000, description="A picture, or a folder: all pictures below it.")
    find: str = Field("", max_length=MOST_WORDS, description="Literal text, replaced wherever it stands.")
    replace: str = Field("", max_length=MOST_WORDS)
    prefix: str = Field("", max_length=MOST_WORDS, description="In front of each line that does not begin with it.")
    suffix: str = Field("", max_length=MOST_WORDS, description="Behind each line that does not end with it.")
    fill: str = Field("", max_length=MOST_WORDS, description="The caption of pictures that have none.")
    dry_run: bool = False


class CaptionExample(BaseModel):
    path: str
    before: str | None
    after: str


class CaptionsEdited(BaseModel):
    pictures: int
    changed: int
    """With `dry_run`, how many would be."""
    examples: list[CaptionExample]
    """The first of them."""


class Trashed(BaseModel):
    success: bool = True
    deleted: int
    trash_path: str


@router.get("/browse", operation_id="browse_datasets", dependencies=[needs("dataset.view")], responses=PATH_ERRORS)
def browse_datasets(
    core: CoreDep, response: Response, path: PathQuery = "", limit: Limit = 100, offset: Offset = 0
) -> Browsed:
    """Folders first. Hidden entries are not shown."""
    places = core.reception.places
    folder = places.folder(path)
    entries, total = list_entries(places, folder, offset, limit)
    response.headers["X-Total-Count"] = str(total)
    shown = [
        EntryView(name=each.name, path=each.path, kind=each.kind, bytes=each.num_bytes, modified_at=each.modified_at)
        for each in entries
    ]
    parent = None if folder == places.root else places.shown(folder.parent)
    return Browsed(path=places.shown(folder), absolute_path=str(folder), parent=parent, entries=shown, total=total)


@router.get("/detect", operation_id="detect_dataset", dependencies=[needs("dataset.view")], responses=PATH_ERRORS)
def detect_dataset(core: CoreDep, path: PathQuery = "") -> Detected:
    """A guess from names and a few headers: nothing is scanned as training would."""
    folder = core.reception.places.folder(path)
    found = suggest_dataset(folder)
    return Detected(
        path=str(folder),
        suggested_dataset=found.entry,
        suggested_conditioning=found.conditioning,
        counts=found.counts,
        captioned=found.num_captioned,
        sizes=found.sizes,
    )


@router.get(
    "/thumbnail",
    operation_id="get_dataset_thumbnail",
    dependencies=[needs("dataset.view")],
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}, **PATH_ERRORS},
)
def get_dataset_thumbnail(
    core: CoreDep, path: PathQuery, size: Annotated[int, Query(ge=16, le=1024)] = 256
) -> Response:
    """A JPEG that fits into a square of `size` pixels, upright."""
    picture = core.reception.places.file(path)
    with core.reception.drawing:
        return Response(draw_thumbnail(picture, size), media_type="image/jpeg")


@router.get("/captions", operation_id="list_captions", dependencies=[needs("dataset.view")], responses=PATH_ERRORS)
def list_captions(
    core: CoreDep, response: Response, path: PathQuery = "", limit: Limit = 100, offset: Offset = 0
) -> CaptionList:
    """Of one picture, or of all below a folder."""
    places = core.reception.places
    found = places.locate(path)
    pictures = list_pictures(found) if found.is_dir() else [found]
    response.headers["X-Total-Count"] = str(len(pictures))
    captions = {places.shown(picture): read_caption(picture) for picture in pictures[offset : offset + limit]}
    return CaptionList(path=places.shown(found), captions=captions, total=len(pictures))


@router.put(
    "/captions",
    operation_id="put_captions",
    dependencies=[needs("dataset.upload"), audits("dataset.captions")],
    responses={**PATH_ERRORS, **error_responses("disk_full")},
)
def put_captions(core: CoreDep, body: CaptionChanges, note: AuditDep) -> Changed:
    """Writes a `.txt` beside each picture; all names are checked before the first is written."""
    changed = write_captions(core.reception.places, body.root)
    note.target, note.detail = next(iter(body.root)), {"changed": changed}
    return Changed(changed=changed)


@router.patch(
    "/captions",
    operation_id="edit_captions",
    dependencies=[needs("dataset.upload"), audits("dataset.captions")],
    responses={**PATH_ERRORS, **error_responses("disk_full")},
)
def edit_captions(core: CoreDep, body: CaptionEditRequest, note: AuditDep) -> CaptionsEdited:
    """One change to the captions of all pictures below a folder; `dry_run` shows what it would do."""
    places = core.reception.places
    edit = CaptionEdit(body.find, body.replace, body.prefix, body.suffix, body.fill)
    if edit == CaptionEdit():
        hint = "Give find and replace, prefix, suffix or fill."
        raise UserError("invalid_field", "This edit changes nothing.", hint=hint, pointer="/find")
    found = places.locate(body.path)
    pictures = list_pictures(found) if found.is_dir() else [found]
    changes = plan_changes(pictures, edit)
    if body.dry_run or not changes:
        note.nothing_done = True
    else:
        write_captions(places, {places.shown(change.picture): change.after for change in changes})
    note.target, note.detail = places.shown(found), {"changed": len(changes)}
    examples = [
        CaptionExample(path=places.shown(change.picture), before=change.before, after=change.after)
        for change in changes[:MOST_EXAMPLES]
    ]
    return CaptionsEdited(pictures=len(pictures), changed=len(changes), examples=examples)


@router.delete(
    "/files",
    operation_id="delete_dataset_files",
    dependencies=[needs("dataset.delete"), audits("dataset.delete")],
    responses=PATH_ERRORS,
)
def delete_dataset_files(
    core: CoreDep, note: AuditDep, path: Annotated[list[PathQuery], Query(min_length=1, max_length=500)]
) -> Trashed:
    """Files or folders go to `.trash` in the datasets folder, from where they can be moved back by hand."""
    folder = move_to_trash(core.reception.places, path)
    note.target, note.detail = path[0], {"deleted": len(path), "trash": folder.name}
    return Trashed(deleted=len(path), trash_path=str(folder))
