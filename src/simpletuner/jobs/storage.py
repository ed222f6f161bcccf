"""What the runner of a worker sends of its job: received beside, and put into place only under a valid lease."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from simpletuner.checkpoints import BEST, hash_file, prune_checkpoints
from simpletuner.errors import UserError
from simpletuner.job import JobDir, fsync_folder, write_atomic

PUBLISHED = "outputs.json"
_PART, _SUM = ".part", ".sum"


class OutputFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def _plain(path: str) -> str:
    """Below a folder, however it is joined to it."""
    if not path or path != str(PurePosixPath(path)) or path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path!r} is no plain path")
    return path


class Outputs(BaseModel):
    """Files of the output folder, by path, and its link to the best checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: dict[Annotated[str, AfterValidator(_plain)], OutputFile] = Field(max_length=200_000)
    best: str | None = Field(default=None, pattern=r"^checkpoint-\d{1,12}$")


class Storage:
    """Of one job and epoch. Nothing of an older epoch is ever looked at.

    What comes lies in a hidden folder of the output folder, so that putting it into place is renaming, never copying.
    """

    def __init__(self, job: JobDir, epoch: int) -> None:
        self._job = job
        self._output_dir = Path(job.read_spec().output_dir)
        self._root = self._output_dir / _incoming(job, epoch)
        self._published = job.root / PUBLISHED

    def begin(self) -> None:
        """What was never published of earlier epochs never will be."""
        forget_incoming(self._job, but=self._root)

    def received(self, path: str) -> tuple[int, bool]:
        """Bytes of `path` that are here, and whether that is all of it."""
        whole = self._locate(path)
        if whole.is_file():
            return whole.stat().st_size, True
        part = _part(whole)
        return (part.stat().st_size if part.exists() else 0), False

    def open(self, path: str, first: int) -> int:
        """A file descriptor that appends from byte `first` on. Raises UserError `offset_mismatch`."""
        whole = self._locate(path)
        whole.parent.mkdir(parents=True, exist_ok=True)
        part = _part(whole)
        if first == 0:
            part.unlink(missing_ok=True)
            whole.unlink(missing_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        size = os.fstat(handle).st_size
        if size != first:
            os.close(handle)
            raise UserError("offset_mismatch", f"{path} goes on at byte {size}, not {first}.", hint=f"offset {size}")
        return handle

    def finish(self, path: str, num_bytes: int, sha256: str) -> None:
        """All of it has come. Raises UserError `invalid_field` for other content than was announced."""
        whole = self._locate(path)
        part = _part(whole)
        if part.stat().st_size != num_bytes or hash_file(part) != sha256:
            part.unlink()
            raise UserError("invalid_field", f"{path} does not match its SHA-256.", pointer="/X-Content-SHA256")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(whole)
        _sum(whole).write_text(sha256)

    def missing(self, outputs: Outputs) -> list[str]:
        """Which of them must still be sent."""
        published = self._read_published()
        return [
            path
            for path, file in outputs.files.items()
            if not (published.get(path) == file and self._is_there(path, file)) and not self._has(path, file)
        ]

    def publish(self, outputs: Outputs, *, checkpoint_limit: int) -> None:
        """Have the output folder hold `outputs`, each checkpoint whole or not at all. None of them may be missing."""
        staged, output_dir = self._root, self._output_dir
        output_dir.mkdir(parents=True, exist_ok=True)
        for leftover in [*staged.rglob(f".*{_SUM}"), *staged.rglob(f".*{_PART}")]:
            leftover.unlink()
        units = {_unit(path) for path in outputs.files if (staged / path).is_file()}
        for path in outputs.files:
            # A checkpoint is replaced as a whole, also by one that differs in a few files.
            if _unit(path) in units and not (staged / path).exists():
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(output_dir / path, staged / path)
        for unit in sorted(units, key=lambda unit: not unit.startswith("checkpoint-")):
            _put(staged / unit, output_dir / unit)
        fsync_folder(output_dir)
        if outputs.best is not None and (output_dir / outputs.best).is_dir():
            _link(output_dir / BEST, outputs.best)
        prune_checkpoints(output_dir, checkpoint_limit, keep=frozenset(_unit(path) for path in outputs.files))
        known = self._read_published() | outputs.files
        write_atomic(self._published, json.dumps({path: file.model_dump() for path, file in known.items()}).encode())

    def _is_there(self, path: str, file: OutputFile) -> bool:
        place = self._output_dir / path
        return place.is_file() and place.stat().st_size == file.bytes

    def _has(self, path: str, file: OutputFile) -> bool:
        whole = self._locate(f"output/{path}")
        return whole.is_file() and _sum(whole).is_file() and _sum(whole).read_text() == file.sha256

    def _read_published(self) -> dict[str, OutputFile]:
        try:
            rows = json.loads(self._published.read_bytes())
        except FileNotFoundError:
            return {}
        return {path: OutputFile.model_validate(row) for path, row in rows.items()}

    def _locate(self, path: str) -> Path:
        """Raises UserError `bad_path`."""
        parts = Path(path).parts
        if parts[:1] == ("artifacts",) and len(parts) == 2 and not parts[1].startswith("."):
            return self._job.artifacts / parts[1]
        is_plain = not Path(path).is_absolute() and ".." not in parts and not path.endswith((_PART, _SUM))
        if parts[:1] != ("output",) or len(parts) < 2 or not is_plain:
            raise UserError(
                "bad_path", f"{path!r} is no place for what a runner sends.", hint="output/… or artifacts/…"
            )
        return self._root.joinpath(*parts[1:])


def forget_incoming(job: JobDir, *, but: Path | None = None) -> None:
    """What was never published of a job, of any epoch."""
    for leftover in Path(job.read_spec().output_dir).glob(_incoming(job, "*")):
        if leftover != but:
            shutil.rmtree(leftover, ignore_errors=True)


def _incoming(job: JobDir, epoch: int | str) -> str:
    return f".incoming-{job.root.name}-{epoch}"


def _part(whole: Path) -> Path:
    return whole.with_name(f".{whole.name}{_PART}")


def _sum(whole: Path) -> Path:
    """Where the hash of a file is kept that was checked when it came."""
    return whole.with_name(f".{whole.name}{_SUM}")


def _unit(path: str) -> str:
    """What is put into place at once: a checkpoint as a folder, everything else file by file."""
    first = path.split("/", 1)[0]
    return first if first.startswith("checkpoint-") else path


def _put(source: Path, place: Path) -> None:
    """By renaming; of a checkpoint there is the old one or the new one, but for an instant."""
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{place.name}-old")
    shutil.rmtree(aside, ignore_errors=True)
    if place.is_dir():
        place.rename(aside)
    source.replace(place)
    shutil.rmtree(aside, ignore_errors=True)


def _link(link: Path, target: str) -> None:
    beside = link.with_name(f".{link.name}-tmp")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(link)
