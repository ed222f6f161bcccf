"""The loop that the trainer is compared with: what somebody would write by hand for one fixed batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

from torch import nn

from simpletuner.data.loader import Batch
from simpletuner.diffusion.objective import Noised
from simpletuner.families.base import Family
from simpletuner.train.update import Update


class BareLoop:
    """Same model, family and Update object as the trainer's; no loader, no noise to draw, nothing to report."""

    def __init__(self, family: Family, denoiser: nn.Module, update: Update, batch: Batch, noised: Noised) -> None:
        self._family = family
        self._denoiser = denoiser
        self._update = update
        self._batch = batch
        self._noised = noised

    def run(
        self,
        first: int,
        steps: int,
        *,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> list[float]:
        """Seconds of each of the steps `first`, `first + 1`, …; the calls surround all of them."""
        times = [time.perf_counter()]
        if before:
            before()
        for step in range(first, first + steps):
            predicted = self._family.predict(self._denoiser, self._noised.latents_BCHW, self._noised.t_B, self._batch)
            loss = (predicted.float() - self._noised.target_BCHW).square().mean()
            loss.backward()
            self._update.apply(step)
            times.append(time.perf_counter())
        if after:
            after()
        return [end - start for start, end in pairwise(times)]
