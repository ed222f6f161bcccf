"""What an environment's files were before: the copies in `.backups`, and who wrote them (api.md §2.3)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simpletuner.errors import UserError
from simpletuner.events import as_text, utc_now
from simpletuner.job import write_atomic

BACKUPS = ".backups"
AUTHORS = ".authors.json"
_AUTHORS_KEPT = 100


@dataclass(frozen=True, slots=True)
class Version:
    """`author` is None for what was written by hand, or before authors were noted."""

    etag: str
    modified_at: str
    author: str | None
    content: bytes
    is_current: bool


def etag_of(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def note_author(folder: Path, content: bytes, author: str | None) -> None:
    """Of a version that `author` has just written."""
    path = folder / AUTHORS
    noted = _read_authors(path)
    etag = etag_of(content)
    noted.pop(etag, None)
    noted[etag] = {"author": author, "at": utc_now()}
    write_atomic(path, json.dumps(dict(list(noted.items())[-_AUTHORS_KEPT:])).encode())


def versions_of(file: Path) -> list[Version]:
    """Newest first, each content once; the first is the file as it is."""
    noted = _read_authors(file.parent / AUTHORS)
    copies = sorted((file.parent / BACKUPS).glob(f"{file.name}.*"), reverse=True)
    found: dict[str, Version] = {}
    for path in [file, *copies] if file.exists() else copies:
        content = path.read_bytes()
        etag = etag_of(content)
        note = noted.get(etag, {})
        # A copy keeps the time of what it is a copy of.
        at = note.get("at") or as_text(datetime.fromtimestamp(path.stat().st_mtime, UTC))
        found.setdefault(etag, Version(etag, at, note.get("author"), content, path == file))
    return list(found.values())


def find_version(file: Path, etag: str) -> Version:
    """`etag` with or without its quotes. Raises UserError `not_found`."""
    wanted = '"' + etag.strip('"') + '"'
    for version in versions_of(file):
        if version.etag == wanted:
            return version
    message = f"{file.parent.name} has no version {wanted} of {file.name} any more."
    raise UserError("not_found", message, hint="GET …/history lists those that are kept.")


def _read_authors(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
