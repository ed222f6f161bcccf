"""The real training loop, a block of steps at a time: it ends where it asks for one batch more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise

from simpletuner.data.loader import Batch
from simpletuner.train.loop import Run, train


class _BlockEnded(Exception):
    """The block's steps are done; the next one has not begun."""


class _Paced:
    """Batches for one block; notes when each was asked for, which is when a step begins."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.asked_at: list[float] = []
        self.left = 0
        self.before: Callable[[], None] | None = None
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.asked_at.append(time.perf_counter())
        if self.left == 0:
            raise _BlockEnded
        self.left -= 1
        if self.before is not None:
            begin, self.before = self.before, None
            begin()
        return next(self._batches)


class TrainerLoop:
    """`simpletuner.train.loop.train` itself, over the run's own loader, metrics, requests and dates."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._paced = _Paced(run.batches)
        run.batches = self._paced

    def run(
        self, steps: int, *, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
    ) -> list[float]:
        """Seconds of each step; `before` is called within the first, `after` once the last is over."""
        paced = self._paced
        paced.left, paced.before = steps, before
        paced.asked_at.clear()
        try:
            outcome = train(self._run)
        except _BlockEnded:
            return [end - start for start, end in pairwise(paced.asked_at)]
        finally:
            if after is not None:
                after()
        raise AssertionError(f"the run ended by itself: {outcome}")
