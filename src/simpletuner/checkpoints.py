"""Checkpoint folders as files: which are there, which is complete, which is the latest. training.md §6.1–6.2.

Torch-free: the trainer writes and reads through this module, the server lists through it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from simpletuner.job import fsync_folder, write_atomic

MANIFEST = "checkpoint_manifest.json"
STATE = "training_state.json"
BEST = "checkpoint-best"
"""A relative link to the checkpoint with the lowest held-out loss."""
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_TEMPORARY = re.compile(r"\.checkpoint-[0-9]+-tmp")


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """A folder with a checkpoint's name; `manifest` is None when it was never completed."""

    path: Path
    step: int
    manifest: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def size_bytes(self) -> int:
        files: dict[str, Any] = self.manifest["files"] if self.manifest else {}
        return sum(entry["size"] for entry in files.values())

    def read_state(self) -> dict[str, Any]:
        return json.loads((self.path / STATE).read_text())


def list_checkpoints(output_dir: Path) -> list[CheckpointFolder]:
    """Newest step first. Folders of other names are nobody's business here."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [CheckpointFolder(path, step, read_manifest(path)) for step, path in sorted(found, reverse=True)]


def find_faults(folder: Path, name: str = MANIFEST) -> list[str]:
    """What keeps a checkpoint from being whole: each sentence names a file. Empty for a good one.

    `name`: of the manifest, where the folder is something else that has one.
    """
    manifest = read_manifest(folder, name)
    if manifest is None:
        return [f"{name} is missing or unreadable"]
    faults: list[str] = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            faults.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif hash_file(path) != entry["sha256"]:
            faults.append(f"{name} does not match its SHA-256")
    return faults


def temporary_folder(output_dir: Path, step: int) -> Path:
    """An empty folder beside the checkpoint's place."""
    folder = output_dir / f".checkpoint-{step}-tmp"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def complete_checkpoint(folder: Path, output_dir: Path, step: int) -> CheckpointFolder:
    """Fsync every file, write the manifest last, rename: from then on it is a checkpoint, before it is nothing."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(inner)
    write_manifest(folder, paths, step)
    place = output_dir / f"checkpoint-{step}"
    if place.exists():
        _remove(place)
    folder.rename(place)
    fsync_folder(output_dir)
    return CheckpointFolder(place, step, read_manifest(place))


def write_manifest(folder: Path, paths: list[Path], step: int, name: str = MANIFEST) -> None:
    """Size and SHA-256 of files in `folder`."""
    files = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hash_file(path)} for path in paths}
    write_atomic(folder / name, json.dumps({"step": step, "files": files}, indent=1).encode())


def prune_checkpoints(output_dir: Path, limit: int, keep: frozenset[str] = frozenset()) -> list[str]:
    """Remove the oldest complete ones beyond `limit` (0: none), but never the best; returns their names."""
    if not limit:
        return []
    keep |= {(output_dir / BEST).resolve().name}
    complete = [folder for folder in list_checkpoints(output_dir) if folder.manifest is not None]
    old = [folder for folder in complete[limit:] if folder.name not in keep]
    for folder in old:
        _remove(folder.path)
    return [folder.name for folder in old]


def remove_temporary(output_dir: Path) -> None:
    for path in _temporary(output_dir):
        shutil.rmtree(path)


def _remove(folder: Path) -> None:
    """The manifest goes first: a removal that is cut short leaves no checkpoint that looks whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary(output_dir: Path) -> Iterator[Path]:
    if output_dir.is_dir():
        yield from (path for path in output_dir.iterdir() if _TEMPORARY.fullmatch(path.name))


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any] | None:
    """None where there is none, or one that nobody of ours wrote."""
    try:
        manifest = json.loads((folder / name).read_text())
    except (OSError, ValueError):
        return None
    return cast(dict[str, Any], manifest) if _is_manifest(manifest) else None


def _is_manifest(value: Any) -> bool:
    files = cast(dict[str, Any], value).get("files") if isinstance(value, dict) else None
    rows = cast(dict[str, Any], files).values() if isinstance(files, dict) else (None,)
    return all(isinstance(row, dict) and {"size", "sha256"} <= cast(dict[str, Any], row).keys() for row in rows)
