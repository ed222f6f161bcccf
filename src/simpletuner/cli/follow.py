"""Shows a job's events: a live bar in a terminal, a line for each thing that happens in a pipe, or JSON."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

_SHOWN = frozenset(
    {
        "training.status",
        "training.checkpoint",
        "training.validation",
        "training.metric",
        "training.upload",
        "notification",
    }
)
"""The error of a failed run is not among them: who follows a run says at its end how it ended."""
_QUIET_STAGES = frozenset({"checkpoint_save", "validation", "training_complete", "training_abort"})
_MARKS = {"warning": "! ", "error": "✗ ", "critical": "✗ ", "success": "✓ "}


class EventPrinter(ABC):
    """Entered around a job; `print` takes a line of its journal, `say` a sentence of ours."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @abstractmethod
    def print(self, line: bytes) -> None: ...

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def build_printer(*, as_json: bool) -> EventPrinter:
    if as_json:
        return JsonPrinter()
    return LivePrinter() if sys.stdout.isatty() else LinePrinter()


class QuietPrinter(EventPrinter):
    """Says what is said, and shows no events."""

    def print(self, line: bytes) -> None:
        return None


class JsonPrinter(EventPrinter):
    """Each event as it stands in the journal."""

    def print(self, line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


class LinePrinter(EventPrinter):
    """One line for each stage that ends and each thing that happens; steps are not things."""

    def print(self, line: bytes) -> None:
        if text := summarise(json.loads(line)):
            print(text, flush=True)


class LivePrinter(EventPrinter):
    """A bar per stage, then one for the steps with loss, steps per second and time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._progress.console.print(text)

    def print(self, line: bytes) -> None:
        event: dict[str, Any] = json.loads(line)
        if event["type"] == "training.progress":
            progress = event["progress"]
            self._update("steps", "Training", progress["current"], progress["total"], step_numbers(progress))
        elif event["type"] == "lifecycle.stage":
            stage = event["stage"]
            if stage["status"] != "skipped":
                done = stage["status"] == "completed"
                total = stage["total"] or 1
                self._update(stage["key"], stage["label"], total if done else stage["current"], total, "")
        elif text := summarise(event):
            self._progress.console.print(text, markup=False, highlight=False)

    def _update(self, key: str, label: str, current: int, total: int, numbers: str) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(label, total=total, numbers="")
        self._progress.update(self._tasks[key], completed=current, total=total, numbers=numbers)


def step_numbers(progress: Mapping[str, Any]) -> str:
    """`12/200  loss 0.1234  3.1 it/s`."""
    metrics = progress["metrics"]
    loss = metrics.get("loss")
    rate = 1 / metrics["step_time_s"] if metrics.get("step_time_s") else 0.0
    shown = "–" if loss is None else f"{loss:.4f}"
    return f"{progress['current']}/{progress['total']}  loss {shown}  {rate:.2f} it/s"


def summarise(event: Mapping[str, Any]) -> str:
    """A line for a person, or nothing."""
    kind, mark = event["type"], _MARKS.get(event.get("severity", ""), "  ")
    if kind == "lifecycle.stage":
        stage = event["stage"]
        if stage["status"] not in ("completed", "failed") or stage["key"] in _QUIET_STAGES:
            return ""
        seconds = stage.get("metadata", {}).get("elapsed_seconds", 0)
        count = f" {stage['current']}" if stage["total"] else ""
        return f"  {stage['label']}:{count} {stage['status']} in {seconds:.1f} s"
    if kind == "training.progress":
        progress = event["progress"]
        is_end = progress["current"] in (1, progress["total"])
        return f"  Step {step_numbers(progress)}" if is_end else ""
    status = event.get("data", {}).get("status")
    if kind not in _SHOWN or status == "started" or (kind == "training.status" and status == "failed"):
        return ""
    hint = event.get("data", {}).get("hint")
    return f"{mark}{event['message']}" + (f" {hint}" if hint else "")
