"""What is due after a step: pure decisions from the options, the state and the requests."""

from __future__ import annotations

import math
from dataclasses import dataclass

from simpletuner.config.train_config import TrainConfig
from simpletuner.data.plan import EpochPlan, check_full_batch
from simpletuner.train.requests import Requests
from simpletuner.train.state import TrainState


@dataclass(frozen=True, slots=True)
class Due:
    """Intervals in steps or epochs; 0 and None mean never."""

    total_steps: int
    checkpoint_interval: int
    validation_interval: int
    validation_epochs: int | None
    eval_interval: int | None
    eval_epochs: int | None
    on_startup: bool = False
    patience: int | None = None
    """Evaluations of the held-out loss without a new lowest that end the run."""

    @classmethod
    def from_config(cls, config: TrainConfig, total_steps: int) -> Due:
        validation = config.validation
        return cls(
            total_steps=total_steps,
            checkpoint_interval=config.checkpoint.checkpoint_step_interval,
            validation_interval=validation.validation_step_interval,
            validation_epochs=validation.validation_epoch_interval,
            eval_interval=validation.eval_steps_interval,
            eval_epochs=validation.eval_epoch_interval,
            on_startup=validation.validation_on_startup,
            patience=config.checkpoint.early_stop_patience,
        )

    def end(self, state: TrainState) -> bool:
        return state.step >= self.total_steps or self.gives_up(state)

    def gives_up(self, state: TrainState) -> bool:
        return self.patience is not None and state.best.stale >= self.patience

    def checkpoint(self, state: TrainState, requests: Requests) -> bool:
        """By interval, on request, before a stop, and at the end; never on the way to a cancel."""
        if requests.end == "cancel":
            return False
        by_interval = self.checkpoint_interval and state.step % self.checkpoint_interval == 0
        return bool(by_interval or requests.checkpoint or requests.end or self.end(state))

    def validation(self, state: TrainState, requests: Requests) -> bool:
        """Images or held-out loss are due; the pass at the end is drawn from the exported file instead."""
        if requests.end is not None or self.end(state):
            return False
        return bool(requests.validate or self.images(state) or self.held_out(state))

    def images(self, state: TrainState) -> bool:
        by_step = self.validation_interval and state.step % self.validation_interval == 0
        return bool(by_step or _epoch_ended(state, self.validation_epochs))

    def held_out(self, state: TrainState) -> bool:
        if self.eval_interval is None and self.eval_epochs is None:
            return self.images(state)
        by_step = self.eval_interval and state.step % self.eval_interval == 0
        return bool(by_step or _epoch_ended(state, self.eval_epochs))


def _epoch_ended(state: TrainState, every: int | None) -> bool:
    return bool(every and state.ended_epoch and state.ended_epoch % every == 0)


def total_steps(config: TrainConfig, plan: EpochPlan) -> int:
    """`max_train_steps`, or the steps that hold every group of `num_train_epochs`."""
    if config.run.max_train_steps:
        return config.run.max_train_steps
    check_full_batch(plan, config.run.num_train_epochs)
    return math.ceil(plan.groups_before(config.run.num_train_epochs) / config.run.gradient_accumulation_steps)
