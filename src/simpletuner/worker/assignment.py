"""What a worker was told to run, and where it keeps it."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

from simpletuner.job import JobDir, JobSpec, hold_lock, is_locked, write_atomic
from simpletuner.jobs.inputs import PLACEHOLDER, Place


class Assignment(BaseModel):
    """A `job_submit`, and whom it came from. Unknown keys of a newer server are left alone."""

    model_config = ConfigDict(frozen=True)

    server_url: str
    verifies_tls: bool = True
    job_id: str
    epoch: int
    attempt: int
    spec: JobSpec
    config: dict[str, Any]
    provenance: dict[str, Any]
    datasets: list[Any]
    places: list[Place]
    """Paths of the server, by the names that stand for them in `config` and `datasets`."""
    resume_from: str | None
    best: str | None
    upload_endpoint: str
    upload_token: str
    lease_s: float
    heartbeat_s: float
    secrets: dict[str, str]


class RunFolder:
    """`<root>/jobs/<job>-<epoch>/`: everything of one assignment. `root` is the worker's, with what jobs share."""

    def __init__(self, root: Path, job_id: str, epoch: int) -> None:
        self.root = root
        self.path = root / "jobs" / f"{job_id}-{epoch}"
        self.job = JobDir(self.path / "job")
        self.output = self.path / "output"
        self.shipped = self.path / "shipped.jsonl"
        self.objects = root / "objects"
        self._file = self.path / "assignment.json"
        self._lock = self.path / "keeper.lock"

    @classmethod
    def at(cls, path: Path) -> RunFolder:
        job_id, _, epoch = path.name.rpartition("-")
        return cls(path.parents[1], job_id, int(epoch))

    def write(self, assignment: Assignment) -> None:
        """It holds a token and secrets: for its owner's eyes."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)
        write_atomic(self._file, assignment.model_dump_json().encode())

    def read(self) -> Assignment:
        return Assignment.model_validate_json(self._file.read_bytes())

    def hold(self) -> AbstractContextManager[None]:
        """Of the keeper, for as long as it lives. Raises BlockingIOError."""
        return hold_lock(self._lock)

    def is_kept(self) -> bool:
        return is_locked(self._lock)

    def place(self, place: Place) -> Path:
        """Where the worker has what the server has at `place.path`."""
        if place.kind == "output":
            return self.output
        if place.kind == "cache":
            return self.root / "caches" / place.name
        inputs = self.path / "inputs" / place.name
        return inputs / place.path.name if place.kind == "file" else inputs

    def create_job(self, assignment: Assignment) -> JobDir:
        """Its directory as a local one, with the paths of this machine."""
        paths = {f"{PLACEHOLDER}{place.name}": str(self.place(place)) for place in assignment.places}
        changes = {"workspace": str(self.path), "config_dir": str(self.path), "output_dir": str(self.output)}
        self.output.mkdir(parents=True, exist_ok=True)
        return JobDir.create(
            self.job.root,
            assignment.spec.model_copy(update=changes),
            config=_filled(assignment.config, paths),
            provenance=assignment.provenance,
            datasets=_filled(assignment.datasets, paths),
        )

    def server_paths(self, assignment: Assignment) -> list[tuple[bytes, bytes]]:
        """`(this machine's, the server's)` as they stand in JSON text: what is shipped speaks of the server's."""
        pairs = [(str(self.place(place)), str(place.path)) for place in assignment.places]
        return [(json.dumps(here)[1:-1].encode(), json.dumps(there)[1:-1].encode()) for here, there in pairs]


def _filled(value: Any, paths: dict[str, str]) -> Any:
    if isinstance(value, str):
        return paths.get(value, value)
    if isinstance(value, dict):
        return {name: _filled(part, paths) for name, part in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_filled(part, paths) for part in cast(list[Any], value)]
    return value
