"""Checkpoints as clients see them; what they are on disk is `simpletuner.checkpoints`' to know."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel

from simpletuner.checkpoints import CheckpointFolder, find_faults, list_checkpoints
from simpletuner.errors import UserError
from simpletuner.events import as_text


class CheckpointView(BaseModel):
    name: str
    path: str
    step: int
    epoch: int | None
    created_at: str
    size_bytes: int
    is_latest: bool
    is_complete: bool
    rolling: bool = False


class CheckpointCheck(BaseModel):
    checkpoint: str
    valid: bool
    message: str
    missing: list[str]


def show_checkpoints(output_dir: Path) -> list[CheckpointView]:
    """Newest first; the latest is the newest complete one."""
    folders = list_checkpoints(output_dir)
    latest = next((folder.name for folder in folders if folder.manifest is not None), None)
    return [
        CheckpointView(
            name=folder.name,
            path=str(folder.path),
            step=folder.step,
            epoch=_epoch(folder),
            created_at=_created_at(folder.path),
            size_bytes=folder.size_bytes,
            is_latest=folder.name == latest,
            is_complete=folder.manifest is not None,
        )
        for folder in folders
    ]


def check_checkpoint(output_dir: Path, name: str) -> CheckpointCheck:
    """Against the hashes of its manifest. Raises UserError `not_found`."""
    folder = next((folder for folder in list_checkpoints(output_dir) if folder.name == name), None)
    if folder is None:
        raise UserError("not_found", f"There is no checkpoint {name} in {output_dir}.")
    faults = find_faults(folder.path)
    message = f"{len(faults)} faults: {faults[0]}." if faults else "Complete."
    return CheckpointCheck(checkpoint=name, valid=not faults, message=message, missing=faults)


def _epoch(folder: CheckpointFolder) -> int | None:
    """None where its state is missing or was written by somebody else."""
    try:
        return folder.read_state()["position"]["epoch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _created_at(path: Path) -> str:
    moment = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return as_text(moment)
