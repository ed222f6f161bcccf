"""A job: its status machine, its frozen specification, and the directory in which the two worlds meet."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from simpletuner.events import Journal, append_line, utc_now


class JobStatus(StrEnum):
    BLOCKED = "blocked"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    COMPLETED = "completed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"
    REJECTED = "rejected"

    @property
    def is_active(self) -> bool:
        return self in ACTIVE

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


ACTIVE = frozenset({JobStatus.STARTING, JobStatus.RUNNING, JobStatus.STOPPING})
TERMINAL = frozenset(
    {
        JobStatus.COMPLETED,
        JobStatus.STOPPED,
        JobStatus.CANCELLED,
        JobStatus.FAILED,
        JobStatus.LOST,
        JobStatus.REJECTED,
    }
)

_ENDS = {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.LOST}

TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.BLOCKED: frozenset({JobStatus.QUEUED, JobStatus.REJECTED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.STARTING, JobStatus.CANCELLED}),
    JobStatus.STARTING: frozenset({JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.STOPPING, JobStatus.STOPPED, *_ENDS}),
    JobStatus.RUNNING: frozenset({JobStatus.QUEUED, JobStatus.STOPPING, JobStatus.STOPPED, *_ENDS}),
    JobStatus.STOPPING: frozenset({JobStatus.QUEUED, JobStatus.STOPPED, JobStatus.CANCELLED, *_ENDS}),
    **{status: frozenset() for status in TERMINAL},
}
"""api.md §4. Any pair not listed is refused by the store."""


class CommandName(StrEnum):
    STOP = "stop"
    CANCEL = "cancel"
    YIELD = "yield"
    VALIDATE = "validate"
    CHECKPOINT = "checkpoint"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Command(_Record):
    """A line of `commands.jsonl`. Consumed in order, once per `request_id`."""

    command: CommandName
    request_id: str = Field(default_factory=lambda: secrets.token_hex(8))
    sent_at: str = Field(default_factory=utc_now)


class JobSpec(_Record):
    """Frozen at submit in `spec.json`; the only thing that a runner and a trainer are told."""

    job_id: str
    config_name: str | None = None
    created_at: str = Field(default_factory=utc_now)
    attempt: int = 1
    workspace: str
    config_dir: str
    output_dir: str
    num_processes: int = 1
    devices: list[int] = Field(default_factory=list[int])
    stop_grace_s: float = 600.0
    continues: bool = False
    """Launched again: it goes on from its own latest checkpoint, whatever it was told to begin with."""


class ExitRecord(_Record):
    """`exit.json`, written by the runner after the trainer is gone. `code` is None when a signal ended it."""

    code: int | None
    signal: int | None = None
    attempt: int = 1
    ended_at: str = Field(default_factory=utc_now)
    mode: Literal["stop", "cancel", "yield"] | None = None
    forced: bool = False
    error_code: str | None = None
    message: str | None = None
    hint: str | None = None
    log_tail: list[str] = Field(default_factory=list)


class RankError(_Record):
    """Why a rank other than the first gave up: the first one, which speaks for all, may not hear of it."""

    rank: int
    code: str
    message: str
    hint: str
    exit_code: int


def new_job_id() -> str:
    return secrets.token_hex(6)


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename, fsync the folder: a reader sees the old bytes or the new ones, never half."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def hold_lock(path: Path) -> Generator[None]:
    """Proof of life: the kernel frees it at any death. Raises BlockingIOError when it is held."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether the holder lives. Tries the lock for an instant, shared, so that two askers do not see each other."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


_RESERVE = ".reserve"
_RESERVE_BYTES = 64 << 10


class JobDir:
    """`<state>/jobs/<job_id>/`: names its files and reads and writes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.journal_path = root / "events.jsonl"
        self.commands_path = root / "commands.jsonl"
        self.log_path = root / "log.txt"
        self.lock_path = root / "lock"
        self.artifacts = root / "artifacts"

    @classmethod
    def create(
        cls, root: Path, spec: JobSpec, *, config: dict[str, Any], provenance: dict[str, Any], datasets: list[Any]
    ) -> JobDir:
        """Freeze a job on disk. `config` maps bare option names to resolved values."""
        job = cls(root)
        job.artifacts.mkdir(parents=True)
        root.chmod(0o700)
        job._write_json("config.json", {"config": config, "provenance": provenance})
        job._write_json("datasets.json", datasets)
        job.write_spec(spec)
        return job

    def write_spec(self, spec: JobSpec) -> None:
        write_atomic(self.root / "spec.json", spec.model_dump_json(indent=1).encode())

    def read_spec(self) -> JobSpec:
        return JobSpec.model_validate_json((self.root / "spec.json").read_bytes())

    def read_config(self) -> dict[str, Any]:
        """`{"config": {name: value}, "provenance": {name: …}}`."""
        return json.loads((self.root / "config.json").read_bytes())

    def read_datasets(self) -> list[Any]:
        return json.loads((self.root / "datasets.json").read_bytes())

    def reserve_exit(self) -> None:
        """Room on the disk for how the job ends, while there is some: a full one must not make it lost."""
        write_atomic(self.root / _RESERVE, bytes(_RESERVE_BYTES))

    def release_exit(self) -> None:
        (self.root / _RESERVE).unlink(missing_ok=True)

    def write_exit(self, record: ExitRecord) -> None:
        write_atomic(self.root / "exit.json", record.model_dump_json(indent=1).encode())

    def read_exit(self) -> ExitRecord | None:
        try:
            return ExitRecord.model_validate_json((self.root / "exit.json").read_bytes())
        except FileNotFoundError:
            return None

    def write_rank_error(self, error: RankError) -> None:
        write_atomic(self.root / f"rank-{error.rank}.json", error.model_dump_json().encode())

    def read_rank_error(self) -> RankError | None:
        """The earliest of this attempt."""
        found = sorted(self.root.glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
        return RankError.model_validate_json(found[0].read_bytes()) if found else None

    def forget_rank_errors(self) -> None:
        for path in self.root.glob("rank-*.json"):
            path.unlink()

    def open_journal(self) -> Journal:
        spec = self.read_spec()
        return Journal(self.journal_path, job_id=spec.job_id, attempt=spec.attempt)

    def send(self, command: Command) -> None:
        """Raises OSError when the disk is full."""
        line = command.model_dump_json().encode() + b"\n"
        handle = os.open(self.commands_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            append_line(handle, line)
        finally:
            os.close(handle)

    def hold_lock(self) -> AbstractContextManager[None]:
        """The runner's proof of life. Raises BlockingIOError when it is held."""
        return hold_lock(self.lock_path)

    def is_locked(self) -> bool:
        """Whether a runner lives."""
        return is_locked(self.lock_path)

    def _write_json(self, name: str, value: Any) -> None:
        write_atomic(self.root / name, _in_lines(value).encode())


def _in_lines(value: Any, depth: int = 2) -> str:
    """JSON with a line for each entry down to `depth`. The library's own indentation takes a third of a submit."""
    if depth and isinstance(value, dict) and value:
        entries = cast(dict[str, Any], value).items()
        lines = [f"{json.dumps(name, ensure_ascii=False)}: {_in_lines(part, depth - 1)}" for name, part in entries]
        return "{\n" + ",\n".join(lines) + "\n}"
    if depth and isinstance(value, list) and value:
        return "[\n" + ",\n".join(_in_lines(part, depth - 1) for part in cast(list[Any], value)) + "\n]"
    return json.dumps(value, ensure_ascii=False)


class CommandReader:
    """Reads new commands since the last call; one `stat` when there are none."""

    def __init__(self, job: JobDir, offset: int = 0) -> None:
        self._path = job.commands_path
        self._offset = offset
        self._seen: set[str] = set()

    def read(self) -> list[Command]:
        try:
            if self._path.stat().st_size <= self._offset:
                return []
        except FileNotFoundError:
            return []
        commands: list[Command] = []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                try:
                    command = Command.model_validate_json(line)
                except ValidationError:
                    # Cut short by a full disk; whoever sent it was told.
                    continue
                if command.request_id not in self._seen:
                    self._seen.add(command.request_id)
                    commands.append(command)
        return commands
