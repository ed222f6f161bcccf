"""What follows from a step, agreed on by all ranks: rank 0 judges, reads what is asked, and tells the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from simpletuner.train.due import Due
from simpletuner.train.metrics import Metrics, StepFacts
from simpletuner.train.ranks import Ranks
from simpletuner.train.requests import RequestReader, Requests
from simpletuner.train.sentinel import RollBack
from simpletuner.train.state import TrainState, rng_tensors


class Lead(Protocol):
    def hear(self, facts: StepFacts, loss: Tensor, norm: Tensor) -> Requests:
        """What is asked of the run after a step, alike on all ranks. Raises RollBack, alike on all ranks too.

        On rank 0 also UserError `diverged` or `dead_run` (72).
        """
        ...


class Between(Protocol):
    """What is done between steps."""

    def checkpoint(self, state: TrainState, requests: Requests) -> None: ...
    def validate(self, state: TrainState, requests: Requests) -> None: ...


@dataclass(frozen=True, slots=True)
class _Word:
    requests: Requests
    strikes: dict[str, int]
    """Of the samples, where there are new ones."""
    roll_back: bool = False


@dataclass(slots=True)
class Speaker:
    """Rank 0."""

    metrics: Metrics
    requests: RequestReader
    state: TrainState
    due: Due
    ranks: Ranks
    _told: dict[str, int] = field(default_factory=dict[str, int])

    def hear(self, facts: StepFacts, loss: Tensor, norm: Tensor) -> Requests:
        try:
            self.metrics.record(facts, loss, norm)
            requests = self.requests.read(self.metrics.drain)
            if self.due.checkpoint(self.state, requests) or self.due.validation(self.state, requests):
                # Now, so that all ranks know what these steps were worth before anything is made of them.
                self.metrics.drain()
        except RollBack:
            self._tell(Requests(), roll_back=True)
            raise
        self._tell(requests)
        return requests

    def _tell(self, requests: Requests, *, roll_back: bool = False) -> None:
        strikes = self.state.quarantine.strikes
        news = {} if strikes == self._told else dict(strikes)
        self._told = dict(strikes) if news else self._told
        self.ranks.share(_Word(requests, news, roll_back))


@dataclass(slots=True)
class Follower:
    """Every other rank: of what happens between steps it only gives what rank 0 cannot know, its generators."""

    state: TrainState
    due: Due
    ranks: Ranks
    attend: Callable[[], None] = lambda: None
    """Do along what rank 0 does between steps, where that takes all ranks."""

    def hear(self, facts: StepFacts, loss: Tensor, norm: Tensor) -> Requests:
        word = self.ranks.share(_Word(Requests(), {}))
        if word.strikes:
            self.state.quarantine.take(word.strikes)
        if word.roll_back:
            raise RollBack
        return word.requests

    def begin(self) -> None:
        """What rank 0 looks at before the first step."""
        if not self.due.end(self.state):
            self.attend()

    def checkpoint(self, state: TrainState, requests: Requests) -> None:
        self.ranks.gather(rng_tensors())
        self.attend()

    def validate(self, state: TrainState, requests: Requests) -> None:
        self.attend()

    def finish(self) -> None:
        """The checkpoint of a run that gave up, if rank 0 makes one; then its export."""
        if self.due.gives_up(self.state) and not self.ranks.share(True):
            self.checkpoint(self.state, Requests())
        self.attend()
