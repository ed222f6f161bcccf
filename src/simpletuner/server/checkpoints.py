"""Checkpoints as they lie on disk, read without torch. Their layout: training.md §6.1."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

NAME = re.compile(r"checkpoint-(\d+)(-rolling)?")
MANIFEST = "checkpoint_manifest.json"
STATE = "training_state.json"


class CheckpointView(BaseModel):
    name: str
    path: str
    step: int
    epoch: int | None
    created_at: str
    size_bytes: int
    is_latest: bool
    is_complete: bool
    rolling: bool


def list_checkpoints(output_dir: Path) -> list[CheckpointView]:
    """Newest first. `latest` is the highest step whose manifest finds all its files."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), bool(match[2]), folder) for folder in output_dir.iterdir() if (match := _match(folder))]
    found.sort(key=lambda entry: entry[:2], reverse=True)
    complete = [folder for _, _, folder in found if not find_missing(folder)]
    latest = complete[0] if complete else None
    return [
        CheckpointView(
            name=folder.name,
            path=str(folder),
            step=step,
            epoch=_read_object(folder / STATE).get("epoch"),
            created_at=_timestamp(folder),
            size_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            is_latest=folder == latest,
            is_complete=folder in complete,
            rolling=rolling,
        )
        for step, rolling, folder in found
    ]


def find_missing(folder: Path) -> list[str]:
    """Files that the manifest names and that are absent or of another size; the manifest itself without one.

    Hashes are the trainer's to check, when it resumes.
    """
    files = _read_object(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        return [MANIFEST]
    sizes = {name: entry.get("bytes") for name, entry in cast(dict[str, dict[str, Any]], files).items()}
    return [name for name, size in sizes.items() if not _has_size(folder / name, size)]


def _match(folder: Path) -> re.Match[str] | None:
    return NAME.fullmatch(folder.name) if folder.is_dir() else None


def _has_size(file: Path, size: int | None) -> bool:
    return file.is_file() and (size is None or file.stat().st_size == size)


def _read_object(file: Path) -> dict[str, Any]:
    """Empty for what cannot be read: a checkpoint may be half gone."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _timestamp(folder: Path) -> str:
    moment = datetime.fromtimestamp(folder.stat().st_mtime, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
