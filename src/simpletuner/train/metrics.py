"""The numbers of every step. They wait on the device and leave in batches: a quiet step reads nothing back."""

from __future__ import annotations

import json
import math
import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.errors import ExitCode, UserError
from simpletuner.events import Event, EventType, NoticeData, Progress, Severity
from simpletuner.job import write_atomic

_RING = 64
_REPORT_INTERVAL_S = 1.0
_DEAD_STEPS = 20
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
    batch_names: tuple[str, ...]


class Metrics:
    """Collects loss and gradient norm per step; writes `training_metrics.jsonl` and `training.progress`."""

    def __init__(
        self,
        emit: Callable[[Event], None],
        path: Path,
        total_steps: int,
        device: torch.device,
        log: Log | None = None,
        adapter: str | None = None,
    ) -> None:
        """`log(step, values)` is told every step's numbers too: trackers. `adapter`: which one, if one is trained."""
        self._log = log
        self._emit = emit
        self._file = path.open("a", encoding="utf-8")
        self._total = total_steps
        self._ring = torch.zeros(_RING, 2, device=device)
        self._facts: list[StepFacts] = []
        self._watch = Watch(adapter)
        self._reported_at = -math.inf
        self._drained_at = time.monotonic()
        self._started_at: float | None = None
        self._done = 0

    def record(self, facts: StepFacts, loss: Tensor, norm: Tensor) -> None:
        """File a step. Nothing is read from the device unless a report is due."""
        torch.stack((loss, norm), out=self._ring[len(self._facts)])
        self._facts.append(facts)
        first_or_last = facts.step == self._total or self._reported_at == -math.inf
        if first_or_last or len(self._facts) == _RING or time.monotonic() - self._reported_at >= _REPORT_INTERVAL_S:
            self.drain()

    def start(self) -> None:
        """The clock of the steps starts here: what came before was not training."""
        self._started_at = self._drained_at = time.monotonic()

    def drain(self) -> None:
        """Write and judge every waiting step. Raises UserError `diverged` or `dead_run` (72)."""
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
            self._watch.see(fact, loss, norm, self._emit)

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


class Watch:
    """Judges steps in order: updates that were skipped for non-finite numbers, gradients that are zero everywhere."""

    def __init__(self, adapter: str | None = None) -> None:
        self._adapter = adapter
        self._skipped: deque[bool] = deque(maxlen=100)
        self._zeros = 0

    def see(self, fact: StepFacts, loss: float, norm: float, emit: Callable[[Event], None]) -> None:
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self._skipped.append(bad)
        self._zeros = self._zeros + 1 if norm == 0 else 0
        if bad:
            emit(_skipped_event(fact, loss, norm))
        if bad and (sum(self._skipped) >= 10 or list(self._skipped)[-3:] == [True] * 3):
            raise UserError(
                "diverged",
                f"Loss or gradient is not a number at step {fact.step}; {sum(self._skipped)} updates were skipped.",
                hint="Lower --learning_rate, or train in fp32; the weights before it are in the last checkpoint.",
                exit_code=ExitCode.DIVERGED,
            )
        # A loss of nothing, as of a batch that is masked all over, explains a gradient of nothing.
        if self._adapter is not None and fact.step == 1 and norm == 0 and loss != 0 and not bad:
            raise UserError(
                "dead_run",
                f"The gradient of the first step is exactly zero: the adapter ({self._adapter}) has no effect.",
                hint="Check its multiplier and alpha, and that its modules take part in the forward pass.",
                exit_code=ExitCode.DIVERGED,
            )
        if self._zeros >= _DEAD_STEPS:
            raise UserError(
                "dead_run",
                f"The gradient has been exactly zero for {_DEAD_STEPS} steps: nothing is being trained.",
                hint="Check --learning_rate, the adapter's targets and the data.",
                exit_code=ExitCode.DIVERGED,
            )


def _skipped_event(fact: StepFacts, loss: float, norm: float) -> Event:
    names = ", ".join(fact.batch_names)
    message = f"Step {fact.step} was skipped: loss {loss}, gradient norm {norm}. Samples: {names}."
    data = NoticeData(code="nonfinite_step", step=fact.step, samples=list(fact.batch_names))  # pyright: ignore[reportCallIssue]
    return Event(
        type=EventType.NOTIFICATION, severity=Severity.WARNING, title="Step skipped", message=message, data=data
    )


def peak_memory_bytes() -> int:
    """Peak of the device where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
