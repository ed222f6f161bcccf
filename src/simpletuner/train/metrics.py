"""The numbers of every step. They wait on the device and leave in batches: a quiet step reads nothing back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.events import Event, EventType, Progress
from simpletuner.job import write_atomic
from simpletuner.process import peak_resident_bytes
from simpletuner.train.sentinel import Judged, Used

_RING = 64
_REPORT_INTERVAL_S = 1.0
_TRACKED = ("loss", "grad_norm", "learning_rate", "step_time_s", "epoch")
Log = Callable[[int, dict[str, float | None]], None]


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What the host knows of a step when it is launched."""

    step: int
    epoch: int
    rate: float
    samples: int
    wait_s: float
    used: tuple[Used, ...]


class Metrics:
    """Collects loss and gradient norm per step; writes `training_metrics.jsonl` and `training.progress`."""

    def __init__(
        self,
        emit: Callable[[Event], None],
        path: Path,
        total_steps: int,
        device: torch.device,
        judge: Callable[[Judged], None],
        log: Log | None = None,
    ) -> None:
        """`judge` sees every step in order; `log(step, values)` is told its numbers too: trackers."""
        self._judge = judge
        self._log = log
        self._emit = emit
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._total = total_steps
        self._ring = torch.zeros(_RING, 2, device=device)
        self._facts: list[StepFacts] = []
        self._reported_at = -math.inf
        self._drained_at = time.monotonic()
        self._started_at: float | None = None
        self._done = 0
        self.report_interval_s = _REPORT_INTERVAL_S

    def record(self, facts: StepFacts, loss: Tensor, norm: Tensor) -> None:
        """File a step. Nothing is read from the device unless a report is due."""
        torch.stack((loss, norm), out=self._ring[len(self._facts)])
        self._facts.append(facts)
        first_or_last = facts.step == self._total or self._reported_at == -math.inf
        if first_or_last or len(self._facts) == _RING or time.monotonic() - self._reported_at >= self.report_interval_s:
            self.drain()

    def start(self) -> None:
        """The clock of the steps starts here: what came before was not training."""
        self._started_at = self._drained_at = time.monotonic()

    def drain(self) -> None:
        """Write and judge every waiting step. Raises what the judge raises."""
        if not self._facts:
            return
        rows: list[list[float]] = self._ring[: len(self._facts)].tolist()
        now = time.monotonic()
        step_time = (now - self._drained_at) / len(rows)
        facts, self._facts = self._facts, []
        for fact, (loss, norm) in zip(facts, rows, strict=True):
            row: dict[str, float | int | None] = {
                "step": fact.step,
                "epoch": fact.epoch,
                "loss": loss if math.isfinite(loss) else None,
                "grad_norm": norm if math.isfinite(norm) else None,
                "learning_rate": fact.rate,
                "step_time_s": round(step_time, 6),
                "data_wait_s": round(fact.wait_s, 6),
            }
            self._file.write(json.dumps(row) + "\n")
            if self._log is not None:
                self._log(fact.step, {f"train/{name}": row[name] for name in _TRACKED})
        self._file.flush()
        self._done += len(rows)
        self._drained_at = self._reported_at = now
        self._report(facts[-1], rows[-1], step_time, now)
        for fact, (loss, norm) in zip(facts, rows, strict=True):
            self._judge(Judged(fact.step, loss, norm, fact.used))

    def rewind(self, step: int) -> None:
        """Forget what came after `step`: the run goes on from there."""
        self._facts.clear()
        self._file.close()
        keep_metrics_until(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def _report(self, fact: StepFacts, row: list[float], step_time: float, now: float) -> None:
        left = self._total - fact.step
        metrics: dict[str, float | int | None] = {
            "loss": row[0] if math.isfinite(row[0]) else None,
            "learning_rate": fact.rate,
            "grad_norm": row[1] if math.isfinite(row[1]) else None,
            "epoch": fact.epoch,
            "samples_per_second": round(fact.samples / step_time, 3) if step_time else None,
            "step_time_s": round(step_time, 6),
            "data_wait_s": round(fact.wait_s, 6),
            "memory_peak_bytes": peak_memory_bytes(),
            "effective_batch_size": fact.samples,
        }
        mean = (now - self._started_at) / self._done if self._started_at is not None else step_time
        progress = Progress(
            label="Steps",
            current=fact.step,
            total=self._total,
            percent=round(100 * fact.step / self._total, 2),
            eta_seconds=round(left * mean, 1),
            metrics=metrics,
        )
        message = f"Step {fact.step}/{self._total}"
        self._emit(Event(type=EventType.TRAINING_PROGRESS, title="Training", message=message, progress=progress))

    def close(self) -> None:
        self._file.close()


def keep_metrics_until(path: Path, step: int) -> None:
    """Cut the rows beyond `step`, and a torn last one: the resumed run writes those steps itself."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    if len(kept) < len(lines):
        write_atomic(path, b"".join(kept))


def peak_memory_bytes() -> int:
    """Peak of the device where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()
