"""What is in the datasets folder: entries, captions, small pictures; and the way into the trash."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from simpletuner.config.picture_files import DAMAGED
from simpletuner.errors import UserError
from simpletuner.job import write_atomic
from simpletuner.server.uploads.media_types import kind_of
from simpletuner.server.uploads.places import Places, shown_text
from simpletuner.server.uploads.stage import naming_failures

MOST_CAPTION_BYTES = 64 << 10
CAPTION = ".txt"


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    path: str
    """Relative to the datasets folder."""
    kind: str
    """`folder`, what `kind_of` says, or `other`."""
    num_bytes: int
    modified_at: datetime


def list_entries(places: Places, folder: Path, offset: int, limit: int) -> tuple[list[Entry], int]:
    """A page of what is in `folder`, folders first, without hidden ones; and how many there are. Raises OSError."""
    with os.scandir(folder) as found:
        names = sorted((not each.is_dir(), each.name) for each in found if not each.name.startswith("."))
    return [_entry(places, folder / name) for _, name in names[offset : offset + limit]], len(names)


def list_pictures(folder: Path) -> list[Path]:
    """All below `folder`, sorted, without hidden ones; links are not followed."""
    return sorted(_walk_pictures(folder))


def read_caption(picture: Path) -> str | None:
    """None without a caption file. At most `MOST_CAPTION_BYTES` of it are read."""
    try:
        with picture.with_suffix(CAPTION).open("rb") as file:
            return file.read(MOST_CAPTION_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return None


def write_captions(places: Places, texts: Mapping[str, str]) -> int:
    """Caption file beside each picture that is named; how many changed. Every name is checked before the first is
    written. Raises UserError `bad_path`, `path_outside_root`, `not_found`, `invalid_field`, `disk_full`."""
    wanted: dict[Path, bytes] = {}
    for written, text in texts.items():
        picture = places.file(written, pointer="/" + written)
        if kind_of(picture.name) not in {"image", "video"}:
            raise UserError("bad_path", f"{shown_text(written)} is no picture and no video.", pointer="/" + written)
        content = _encode(written, text)
        caption = picture.with_suffix(CAPTION)
        if not places.holds(caption):
            message = f"The caption file of {shown_text(written)} leads out of the datasets folder."
            raise UserError("path_outside_root", message, hint="Remove that link.", pointer="/" + written)
        if wanted.setdefault(caption, content) != content:
            message = f"{shown_text(written)} shares its caption file with another one of this request."
            raise UserError("invalid_field", message, hint="Rename one of the two.", pointer="/" + written)
    changed = {caption: content for caption, content in wanted.items() if _differs(caption, content)}
    for caption, content in changed.items():
        with naming_failures(places.shown(caption)):
            write_atomic(caption, content)
    return len(changed)


def draw_thumbnail(picture: Path, edge: int) -> bytes:
    """A JPEG that fits into a square of `edge` pixels. Raises UserError `bad_path` for what is no picture."""
    try:
        with Image.open(picture) as image:
            image.draft("RGB", (edge, edge))
            image.thumbnail((edge, edge))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except DAMAGED as error:
        raise UserError("bad_path", f"{picture.name} is no picture that can be shown.", pointer="/path") from error
    file = BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def move_to_trash(places: Places, written: list[str]) -> Path:
    """Moves all of them, checked before the first is moved, into a new folder of the trash, under the paths they had.

    Raises UserError as `Places.entry`, `permission_denied`.
    """
    entries = {places.entry(each): None for each in written}
    outermost = [entry for entry in entries if not any(other in entry.parents for other in entries)]
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = places.trash / f"{stamp}-{secrets.token_hex(4)}"
    for entry in outermost:
        shown = places.shown(entry)
        with naming_failures(shown):
            to = folder / shown
            to.parent.mkdir(parents=True, exist_ok=True)
            entry.rename(to)
    return folder


def _entry(places: Places, path: Path) -> Entry:
    file = path.lstat()
    if path.is_dir():
        return Entry(path.name, places.shown(path), "folder", 0, _time(file.st_mtime))
    return Entry(path.name, places.shown(path), kind_of(path.name) or "other", file.st_size, _time(file.st_mtime))


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _walk_pictures(folder: Path) -> Iterator[Path]:
    for here, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from (Path(here, name) for name in names if not name.startswith(".") and kind_of(name) == "image")


def _encode(written: str, text: str) -> bytes:
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        message = f"The caption of {shown_text(written)} is not Unicode text."
        raise UserError("invalid_field", message, pointer="/" + written) from error
    if len(content) > MOST_CAPTION_BYTES:
        message = f"The caption of {shown_text(written)} is longer than {MOST_CAPTION_BYTES} bytes."
        raise UserError("invalid_field", message, pointer="/" + written)
    return content


def _differs(caption: Path, content: bytes) -> bool:
    return not caption.exists() or caption.read_bytes() != content
