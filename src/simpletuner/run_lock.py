"""`run_lock.json`: what a run was made of, and its first losses to the bit. training.md §6.4.

Torch-free: the trainer writes it, `simpletuner replay` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from simpletuner.errors import ExitCode, UserError
from simpletuner.events import utc_now
from simpletuner.job import write_atomic

LOCK = "run_lock.json"
METRICS = "training_metrics.jsonl"
KEPT_LOSSES = 20


class DataFacts(BaseModel):
    """One dataset: hash of its samples, plans and captions, and how many of its pictures are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    fingerprint: str
    kept: int


class RunLock(BaseModel):
    """Of the run that made the first step; a run that goes on from its checkpoints adds itself and changes nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: int = 1
    job_id: str
    workspace: str
    created_at: str = Field(default_factory=utc_now)
    config: dict[str, Any]
    """Without secrets."""
    provenance: dict[str, Any]
    datasets: list[Any]
    data: dict[str, DataFacts]
    versions: dict[str, str]
    seed: int
    device: str
    losses: list[str | None] = Field(default_factory=list[str | None])
    """Of the first steps, as `float.hex`; None where a loss was no number."""
    continued_by: list[str] = Field(default_factory=list[str])

    @property
    def latest_job_id(self) -> str:
        return self.continued_by[-1] if self.continued_by else self.job_id

    def differences(self, other: RunLock, *, ignore: Mapping[str, Any]) -> list[str]:
        """A sentence for each thing that is not the same in `other`; options named in `ignore` may differ."""
        found = _changed("", self.versions, other.versions)
        found += _changed("", {"device": self.device}, {"device": other.device})
        own, theirs = ({k: v for k, v in lock.config.items() if k not in ignore} for lock in (self, other))
        return found + _changed("--", own, theirs)

    def changed_data(self, other: RunLock) -> list[str]:
        """A sentence for each dataset that is not the same in `other`."""
        ids = sorted(self.data.keys() | other.data.keys())
        kept = {name: [lock.data[name].kept if name in lock.data else 0 for lock in (self, other)] for name in ids}
        return [
            f"{name} is not what it was ({kept[name][0]} samples then, {kept[name][1]} now)"
            for name in ids
            if self.data.get(name) != other.data.get(name)
        ]


def write_lock(output_dir: Path, lock: RunLock) -> None:
    write_atomic(output_dir / LOCK, (lock.model_dump_json(indent=1) + "\n").encode())


def read_lock(path: Path) -> RunLock:
    """Its losses come from the metrics beside it where the run had no time to note them.

    Raises UserError `run_lock_missing` or `run_lock_unreadable` (64).
    """
    try:
        lock = RunLock.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        hint = f"A run writes {LOCK} into its output folder when its first step is near."
        raise UserError("run_lock_missing", f"{path} does not exist.", hint=hint) from error
    except (OSError, ValidationError) as error:
        hint = f"Name a {LOCK} as a run wrote it."
        raise UserError("run_lock_unreadable", f"{path} cannot be read: {error}", hint=hint) from error
    return lock if lock.losses else lock.model_copy(update={"losses": first_losses(path.parent)})


def first_losses(output_dir: Path, limit: int = KEPT_LOSSES) -> list[str | None]:
    """As they stand in the metrics, from step 1 on: JSON keeps every bit of a float."""
    try:
        with (output_dir / METRICS).open("rb") as file:
            rows = [json.loads(line) for line in islice(file, limit) if line.endswith(b"\n")]
    except FileNotFoundError:
        return []
    except ValueError as error:
        message = f"{output_dir / METRICS} is not what a run writes: {error}"
        raise UserError("run_lock_unreadable", message, exit_code=ExitCode.CONFIG) from error
    # A run that went on from a checkpoint elsewhere begins later: it has no first losses.
    first = [row["loss"] for step, row in enumerate(rows, 1) if row["step"] == step]
    return [None if loss is None else float(loss).hex() for loss in first]


def _changed(prefix: str, own: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    names = [name for name in sorted(own.keys() | theirs.keys()) if own.get(name) != theirs.get(name)]
    return [f"{prefix}{name}: {own.get(name)!r} then, {theirs.get(name)!r} now" for name in names]
