"""Judges steps in order: numbers that are none, gradients that are zero. training.md §9."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from simpletuner.data.ledger import mark_dropped
from simpletuner.data.loader import Members
from simpletuner.errors import ExitCode, UserError
from simpletuner.train.quarantine import STRIKES, Quarantine
from simpletuner.train.report import Reporter

NonfiniteAction = Literal["skip", "rollback"]
_DEAD_STEPS = 20
_ROLLBACKS = 3


@dataclass(frozen=True, slots=True)
class Used:
    """One micro-batch of a step over all ranks, as it has to be named if the step goes wrong."""

    members: Members
    shape: torch.Size
    """Of its latents on one rank."""
    first: int
    """Number of its first sample within the step."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What is known of a step that is over."""

    step: int
    loss: float
    norm: float
    used: tuple[Used, ...]

    @property
    def is_bad(self) -> bool:
        return not (math.isfinite(self.loss) and math.isfinite(self.norm))

    @property
    def samples(self) -> list[str]:
        return [sample for micro in self.used for sample in micro.members.samples]


class RollBack(Exception):
    """The run is to go on from its last checkpoint, without the samples of the step that went wrong."""


Timesteps = Callable[[Used, int], Tensor]
"""A micro-batch and its 0-based optimizer step → t of each of its samples."""


class Sentinel:
    def __init__(
        self,
        quarantine: Quarantine,
        reporter: Reporter,
        ledger: Callable[[str], Path],
        timesteps: Timesteps,
        *,
        action: NonfiniteAction = "skip",
        adapter: str | None = None,
        in_parts: bool = False,
    ) -> None:
        """`ledger` gives the file of a dataset's ledger; `adapter` describes it, where one is trained.

        `in_parts`: of a step that goes wrong only those weights stay as they are whose gradients are no numbers.
        """
        self._quarantine = quarantine
        self._reporter = reporter
        self._ledger = ledger
        self._timesteps = timesteps
        self._action = action
        self._adapter = adapter
        self._what = "left weights as they were whose gradient is no number" if in_parts else "was skipped"
        self._skipped: deque[bool] = deque(maxlen=100)
        self._zeros = 0
        self._rollbacks = 0

    def see(self, judged: Judged) -> None:
        """Raises UserError `diverged` or `dead_run` (72), or RollBack."""
        # A sample in quarantine may still be in batches that were under way: what it does there is known.
        known = judged.is_bad and not self._quarantine.names.isdisjoint(judged.samples)
        self._skipped.append(judged.is_bad and not known)
        if judged.is_bad:
            self._warn(judged)
        if judged.is_bad and not known:
            self._check_divergence(judged.step)
            self._strike(judged)
        self._check_gradient(judged)

    def saved(self) -> None:
        """A checkpoint was written: what follows starts from weights that are good."""
        self._rollbacks = 0

    def _check_divergence(self, step: int) -> None:
        count = sum(self._skipped)
        if count >= 10 or list(self._skipped)[-3:] == [True] * 3 or self._rollbacks >= _ROLLBACKS:
            raise UserError(
                "diverged",
                f"Loss or gradient is not a number at step {step}; {count} updates were skipped.",
                hint="Lower --learning_rate, or train in fp32; the weights before it are in the last checkpoint.",
                exit_code=ExitCode.DIVERGED,
            )

    def _strike(self, judged: Judged) -> None:
        at_once = self._action == "rollback"
        fresh = [
            sample
            for sample in dict.fromkeys(judged.samples)
            if self._quarantine.strike(sample, STRIKES if at_once else 1)
        ]
        paths: dict[str, set[str]] = {}
        for sample in fresh:
            dataset, _, path = sample.partition("/")
            paths.setdefault(dataset, set()).add(path)
        for dataset, dropped in paths.items():
            mark_dropped(self._ledger(dataset), dropped, "quarantined")
        if fresh:
            names = ", ".join(fresh)
            self._reporter.warn(
                "sample_quarantined",
                f"Left out from here on, since updates with them had to be skipped: {names}.",
                hint="Look at these pictures and their captions.",
                samples=fresh,
                step=judged.step,
            )
        if at_once and fresh:
            self._rollbacks += 1
            raise RollBack

    def _warn(self, judged: Judged) -> None:
        names = ", ".join(judged.samples)
        self._reporter.warn(
            "nonfinite_step",
            f"Step {judged.step} {self._what}: loss {judged.loss}, gradient norm {judged.norm}. Samples: {names}.",
            step=judged.step,
            samples=judged.samples,
            captions=[caption for micro in judged.used for caption in micro.members.captions],
            t=[round(t, 3) for micro in judged.used for t in self._timesteps(micro, judged.step - 1).tolist()],
        )

    def _check_gradient(self, judged: Judged) -> None:
        """A loss of exactly zero is a batch that its masks cover whole: nothing could have been learnt from it."""
        self._zeros = self._zeros + 1 if judged.norm == 0 else 0
        if (
            self._adapter is not None
            and judged.step == 1
            and judged.norm == 0
            and judged.loss != 0
            and not judged.is_bad
        ):
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
