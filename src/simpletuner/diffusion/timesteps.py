"""Which timesteps are trained on: weights over [0, T), stratified over the samples of a step. training.md §4.2."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from simpletuner.config.training_options import LossOptions
from simpletuner.data.keys import key_seed, u

Weights = npt.NDArray[np.float64]


def timestep_weights(count: int, options: LossOptions) -> Weights:
    """Probability of each of `count` timesteps: biased part, cut to the expert's range, normalised once."""
    weights = np.ones(count)
    portion = round(options.timestep_bias_portion * count)
    match options.timestep_bias_strategy:
        case "none":
            biased = slice(0, 0)
        case "earlier":
            biased = slice(0, portion)
        case "later":
            biased = slice(count - portion, count)
        case "range":
            biased = slice(options.timestep_bias_begin, options.timestep_bias_end)
    weights[biased] *= options.timestep_bias_multiplier
    if options.refiner_training:
        border = round(options.refiner_training_strength * count)
        outside = slice(0, border) if options.refiner_training_invert_schedule else slice(border, count)
        weights[outside] = 0
    return weights / weights.sum()


class StratifiedTimesteps:
    """t_i = CDF⁻¹((π(i) + U_i) / n): one of n strata each, so every sample keeps the full marginal.

    π is a permutation keyed by (seed, step), U_i by the sample's visit; nothing depends on ranks or restarts.
    """

    def __init__(self, weights: Weights, *, seed: int, samples_per_step: int) -> None:
        self._cumulative = np.cumsum(weights)
        self._cumulative[-1] = 1.0
        self._last = int(np.flatnonzero(weights)[-1])
        self._seed = seed
        self._count = samples_per_step

    def draw(self, step: int, first: int, visits: Sequence[tuple[str, int]]) -> npt.NDArray[np.int64]:
        """Timesteps of the samples `first`, `first + 1`, … of optimizer step `step`, given as (sample id, visit)."""
        generator = np.random.Generator(np.random.PCG64(key_seed("strata", self._seed, step)))
        strata = generator.permutation(self._count)[first : first + len(visits)]
        within = np.array([u("timestep", self._seed, sample, visit) for sample, visit in visits])
        found = np.searchsorted(self._cumulative, (strata + within) / self._count, side="right")
        return np.minimum(found, self._last).astype(np.int64)
