"""What the trainer tells the world: stages, events, images. Everything goes through the journal."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from simpletuner.errors import UserError
from simpletuner.events import (
    Checkpoint,
    Event,
    EventType,
    HookData,
    Journal,
    Media,
    MetricData,
    NoticeData,
    Severity,
    Stage,
    TrainingStatusData,
    UploadData,
    ValidationData,
    ValidationImageData,
)

_STAGE_INTERVAL_S = 0.5


class Follower(Protocol):
    """Is told of values and images too, once they are in the journal; of previews from another thread."""

    def metric(self, step: int, name: str, value: float) -> None: ...

    def image(self, data: ValidationImageData, name: str, content: bytes) -> None: ...


class Reporter:
    """Writes events of one job; `artifacts` is the folder that images are put into."""

    def __init__(self, journal: Journal | None, artifacts: Path) -> None:
        """Without a journal nothing is told: a rank that another one speaks for."""
        self._journal = journal
        self._artifacts = artifacts
        self._open_stages: list[StageReport] = []
        self.step = 0
        self.total_steps = 0
        self.predicted_bytes: int | None = None
        """Of memory, once it is known."""
        self.followers: list[Follower] = []

    def emit(self, event: Event) -> None:
        if event.progress is not None:
            self.step, self.total_steps = event.progress.current, event.progress.total
        if self._journal is not None:
            self._journal.append(event)

    @property
    def open_stage(self) -> str | None:
        """Key of the innermost stage that is under way."""
        return self._open_stages[-1].key if self._open_stages else None

    @contextmanager
    def stage(self, key: str, label: str) -> Generator[StageReport]:
        """A stage that fails stays open: `fail_stages` closes it with the reason, at the process's edge."""
        report = StageReport(self, key, label)
        self._open_stages.append(report)
        report.start()
        yield report
        report.finish()
        self._open_stages.pop()

    def stage_beside(self, key: str, label: str) -> StageReport:
        """A stage beside the others: whoever began it says how it ends."""
        report = StageReport(self, key, label)
        report.start()
        return report

    def skip_stage(self, key: str, label: str) -> None:
        self.emit(_stage_event(Stage(key=key, label=label, status="skipped", percent=100.0)))

    def fail_stages(self, down_to: str | None = None) -> None:
        """Close every open stage as failed, innermost first; only as far as the stage with the key `down_to`."""
        while self._open_stages:
            stage = self._open_stages.pop()
            stage.fail()
            if stage.key == down_to:
                return

    def notify(
        self, code: str, message: str, *, hint: str = "", severity: Severity = Severity.INFO, **data: Any
    ) -> None:
        notice = NoticeData(code=code, hint=hint, **data)
        self.emit(Event(type=EventType.NOTIFICATION, severity=severity, title=message, message=message, data=notice))

    def warn(self, code: str, message: str, *, hint: str = "", **data: Any) -> None:
        self.notify(code, message, hint=hint, severity=Severity.WARNING, **data)

    def error(self, error: UserError, **data: Any) -> None:
        notice = NoticeData(code=error.code, hint=error.hint, pointer=error.pointer, **data)
        self.emit(
            Event(type=EventType.ERROR, severity=Severity.ERROR, title=error.code, message=error.message, data=notice)
        )

    def status(self, data: TrainingStatusData, *, severity: Severity = Severity.INFO) -> None:
        self.step, self.total_steps = data.global_step, data.total_num_steps
        message = data.reason or f"Training {data.status} at step {data.global_step} of {data.total_num_steps}."
        self.emit(
            Event(
                type=EventType.TRAINING_STATUS,
                severity=severity,
                title=f"Training {data.status}",
                message=message,
                data=data,
            )
        )

    def metric(self, name: str, value: float, step: int, standard_error: float | None = None) -> None:
        data = MetricData(name=name, value=value, step=step, standard_error=standard_error)
        message = f"{name} = {value:.6g} at step {step}"
        self.emit(Event(type=EventType.TRAINING_METRIC, title=name, message=message, data=data))
        for follower in self.followers:
            follower.metric(step, name, value)

    def checkpoint(self, checkpoint: Checkpoint, request_id: str | None = None) -> None:
        self.emit(
            Event(
                type=EventType.TRAINING_CHECKPOINT,
                severity=Severity.SUCCESS,
                title="Checkpoint saved",
                message=f"{checkpoint.label} ({checkpoint.bytes / 1e6:.1f} MB)",
                checkpoint=checkpoint,
                request_id=request_id,
            )
        )

    def validation(self, data: ValidationData, request_id: str | None = None) -> None:
        severity = Severity.WARNING if data.status == "failed" else Severity.INFO
        self.emit(
            Event(
                type=EventType.TRAINING_VALIDATION,
                severity=severity,
                title=f"Validation {data.status}",
                message=data.reason or f"Validation {data.status} at step {data.step}.",
                data=data,
                request_id=request_id,
            )
        )

    def hook(self, data: HookData) -> None:
        """Told from another thread than the rest: the journal takes whole lines."""
        severity = Severity.INFO if data.status == "completed" else Severity.WARNING
        code = "" if data.exit_code is None else f", exit code {data.exit_code}"
        message = f"--{data.script}: {data.status}{code}, {data.seconds:.1f} s."
        self.emit(
            Event(type=EventType.TRAINING_HOOK, severity=severity, title="Program ended", message=message, data=data)
        )

    def upload(self, data: UploadData) -> None:
        """Told from another thread than the rest, as `hook` is."""
        severity = Severity.SUCCESS if data.status == "completed" else Severity.WARNING
        message = f"{data.label} → {data.url}" + (f": {data.reason}" if data.reason else "")
        self.emit(
            Event(
                type=EventType.TRAINING_UPLOAD,
                severity=severity,
                title=f"Upload {data.status}",
                message=message,
                data=data,
            )
        )

    def image(self, data: ValidationImageData, name: str, content: bytes, mime_type: str) -> None:
        """Keep an image file among the job's artifacts and refer to it."""
        artifact_id = f"{data.validation_type}-{data.global_step}-{name}"
        (self._artifacts / artifact_id).write_bytes(content)
        width, height = data.resolution
        media = Media(artifact_id=artifact_id, mime_type=mime_type, width=width, height=height)
        self.emit(
            Event(
                type=EventType.VALIDATION_IMAGE,
                title=f"Validation (step {data.step_label}): {data.shortname}",
                message=data.prompt,
                body=data.prompt,
                data=data,
                images=[media],
            )
        )
        for follower in self.followers:
            follower.image(data, name, content)


class StageReport:
    """A stage's progress, at most twice a second between start and end; percent never falls."""

    def __init__(self, reporter: Reporter, key: str, label: str) -> None:
        self._reporter = reporter
        self.key = key
        self._label = label
        self._current = 0
        self._total = 0
        self._started_at = time.monotonic()
        self._said_at = 0.0

    def start(self) -> None:
        self._say("running", 0.0)

    def advance(self, current: int, total: int) -> None:
        self._current, self._total = max(current, self._current), total
        now = time.monotonic()
        if now - self._said_at >= _STAGE_INTERVAL_S and 0 < self._current < total:
            self._say("running", 100.0 * self._current / total)

    def finish(self) -> None:
        self._current = self._total
        self._say("completed", 100.0)

    def fail(self) -> None:
        self._say("failed", 100.0 * self._current / self._total if self._total else 0.0)

    def _say(self, status: Any, percent: float) -> None:
        self._said_at = time.monotonic()
        elapsed = self._said_at - self._started_at
        metadata: dict[str, Any] = {"elapsed_seconds": round(elapsed, 3)}
        if status == "running" and self._current:
            metadata["eta_seconds"] = round(elapsed * (self._total - self._current) / self._current, 1)
        stage = Stage(
            key=self.key,
            label=self._label,
            status=status,
            percent=round(percent, 2),
            current=self._current,
            total=self._total,
            metadata=metadata,
        )
        self._reporter.emit(_stage_event(stage))


def _stage_event(stage: Stage) -> Event:
    return Event(
        type=EventType.LIFECYCLE_STAGE, title=stage.label, message=f"{stage.label}: {stage.status}", stage=stage
    )
