"""Events and the journal they are written to: one JSON line per event, appended, never changed.

The journal is the only pipe between a job and the world. An event's number within its job is its line number, so
numbers are gapless by construction, whoever writes (the trainer and its runner both do).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny


def as_text(moment: datetime) -> str:
    """RFC 3339, UTC, milliseconds: `2026-01-02T03:04:05.678Z`; such texts sort as times do."""
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc_now() -> str:
    return as_text(datetime.now(UTC))


class EventType(StrEnum):
    JOB_STATUS = "job.status"
    JOB_WAITING = "job.waiting"
    LIFECYCLE_STAGE = "lifecycle.stage"
    TRAINING_STATUS = "training.status"
    TRAINING_PROGRESS = "training.progress"
    TRAINING_METRIC = "training.metric"
    TRAINING_CHECKPOINT = "training.checkpoint"
    TRAINING_VALIDATION = "training.validation"
    VALIDATION_IMAGE = "validation.image"
    TRAINING_UPLOAD = "training.upload"
    TRAINING_HOOK = "training.hook"
    TRAINING_SUMMARY = "training.summary"
    LOG = "log"
    NOTIFICATION = "notification"
    ERROR = "error"
    CONFIG_UPDATED = "config.updated"
    QUEUE_UPDATED = "queue.updated"
    WORKER_STATUS = "worker.status"


class Severity(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    SUCCESS = "success"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Progress(_Part):
    label: str
    current: int
    total: int
    percent: float
    eta_seconds: float | None = None
    metrics: dict[str, float | int | None] = Field(default_factory=dict)


class Stage(_Part):
    key: str
    status: Literal["pending", "running", "completed", "failed", "skipped"]
    label: str
    percent: float = 0.0
    current: int = 0
    total: int = 0
    metadata: dict[str, Any] = Field(default_factory=dict)


class Checkpoint(_Part):
    path: str
    label: str
    step: int
    is_final: bool = False
    rolling: bool = False
    bytes: int = 0
    seconds: float = 0.0


class Media(_Part):
    """A reference to an artifact of the job; readers add `src`."""

    artifact_id: str
    mime_type: str
    width: int | None = None
    height: int | None = None


class JobStatusData(_Part):
    from_: str | None = Field(alias="from", default=None)
    to: str
    reason: str | None = None
    attempt: int = 1
    exit: dict[str, Any] | None = None


class JobWaitingData(_Part):
    position: int
    reason: str
    reason_code: str


class TrainingStatusData(_Part):
    status: Literal["running", "resumed", "stopping", "completed", "stopped", "cancelled", "failed"]
    global_step: int
    total_num_steps: int
    epoch: int = 0
    final_epoch: int = 0
    resumed_from: str | None = None
    reason: str | None = None
    exit_code: int | None = None


class MetricData(_Part):
    name: str
    value: float
    step: int
    standard_error: float | None = None


class ValidationData(_Part):
    status: Literal["started", "completed", "skipped", "failed"]
    step: int
    cause: str
    num_images: int = 0
    seconds: float = 0.0
    reason: str | None = None


class ValidationImageData(_Part):
    step: int
    timestep: float
    resolution: tuple[int, int]
    validation_type: Literal["intermediary", "final", "benchmark"]
    prompt: str
    step_label: str
    global_step: int
    shortname: str
    index: int = 0


class UploadData(_Part):
    """One upload to one provider, at its end; `url` is where it is, or would have been."""

    provider: str
    url: str
    status: Literal["completed", "failed", "cancelled"]
    step: int
    label: str
    is_final: bool = False
    num_files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reason: str | None = None


class HookData(_Part):
    """One program of the user's, at its end; `argv` with `{env:NAME}` as it was written."""

    script: str
    argv: list[str]
    status: Literal["completed", "failed", "timed_out", "cancelled"]
    exit_code: int | None = None
    seconds: float = 0.0
    output_tail: str = ""


class SummaryData(_Part):
    steps: int
    samples: int
    seconds: float
    memory_peak_bytes: int
    memory_predicted_bytes: int | None = None
    memory_choice: dict[str, Any] = Field(default_factory=dict)
    """Options that `memory_budget` chose."""
    files: list[str] = Field(default_factory=list)


class LogData(_Part):
    stream: Literal["stdout", "stderr"]
    level: str = "info"
    first_line: int
    lines: list[str]


class NoticeData(BaseModel):
    """Of `notification` and `error`; further keys belong to the code (such as the counts of `dataset_report`)."""

    model_config = ConfigDict(extra="allow", frozen=True)
    code: str
    hint: str = ""
    pointer: str = ""


class NoData(_Part):
    pass


class AnyData(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


PAYLOADS: dict[EventType, type[BaseModel]] = {
    EventType.JOB_STATUS: JobStatusData,
    EventType.JOB_WAITING: JobWaitingData,
    EventType.LIFECYCLE_STAGE: NoData,
    EventType.TRAINING_STATUS: TrainingStatusData,
    EventType.TRAINING_PROGRESS: NoData,
    EventType.TRAINING_METRIC: MetricData,
    EventType.TRAINING_CHECKPOINT: NoData,
    EventType.TRAINING_VALIDATION: ValidationData,
    EventType.VALIDATION_IMAGE: ValidationImageData,
    EventType.TRAINING_UPLOAD: UploadData,
    EventType.TRAINING_HOOK: HookData,
    EventType.TRAINING_SUMMARY: SummaryData,
    EventType.LOG: LogData,
    EventType.NOTIFICATION: NoticeData,
    EventType.ERROR: NoticeData,
    EventType.CONFIG_UPDATED: AnyData,
    EventType.QUEUE_UPDATED: AnyData,
    EventType.WORKER_STATUS: AnyData,
}


class Event(_Part):
    """What is written to the journal. Numbering (`index`, `id`) belongs to the reader."""

    type: EventType
    severity: Severity = Severity.INFO
    job_id: str | None = None
    attempt: int = 1
    timestamp: str = Field(default_factory=utc_now)
    title: str = ""
    message: str = ""
    body: str | None = None
    request_id: str | None = None
    data: SerializeAsAny[BaseModel] = Field(default_factory=NoData)
    progress: Progress | None = None
    stage: Stage | None = None
    checkpoint: Checkpoint | None = None
    images: list[Media] | None = None

    def model_post_init(self, _context: Any) -> None:
        if not isinstance(self.data, PAYLOADS[self.type]):
            raise TypeError(f"{self.type} carries {PAYLOADS[self.type].__name__}, not {type(self.data).__name__}")

    def as_line(self) -> bytes:
        return self.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n"


class Journal:
    """Appends events to `path`. Each event is one `write`, so several writers never mix their lines."""

    def __init__(self, path: Path, *, job_id: str, attempt: int = 1) -> None:
        self.job_id = job_id
        self.attempt = attempt
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._maybe_torn = True

    def append(self, event: Event) -> None:
        """Raises OSError when the disk is full; the torn line is ended before the next one."""
        line = event.model_copy(update={"job_id": self.job_id, "attempt": self.attempt}).as_line()
        maybe_torn, self._maybe_torn = self._maybe_torn, True
        append_line(self._file, line, maybe_torn=maybe_torn)
        self._maybe_torn = False

    def close(self) -> None:
        os.close(self._file)


def append_line(file: int, line: bytes, *, maybe_torn: bool = True) -> None:
    """One `write`; `maybe_torn`: the line before it may lack its end. Raises OSError when there is no room for all."""
    if maybe_torn:
        _end_torn_line(file)
    if os.write(file, line) < len(line):
        raise OSError(errno.ENOSPC, "no space left for a line")


def _end_torn_line(file: int) -> None:
    """A line that was cut short (full disk, kill) must not spoil the next one; readers skip it."""
    size = os.lseek(file, 0, os.SEEK_END)
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")


def read_journal(path: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield `(offset after the line, line)` for each complete line from byte `offset` on."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, line
