"""Flow matching: straight lines from picture to noise. training.md §4.2 (arXiv:2209.03003, arXiv:2403.03206)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simpletuner.config.flux_options import FluxOptions
from simpletuner.config.training_options import LossOptions
from simpletuner.data.keys import key_seed, u
from simpletuner.diffusion.objective import Noised, sample_noise

_FAST_LEVELS = (1.0, 0.75, 0.5, 0.25)
"""Noise levels of schnell's four sampler steps."""


class FlowObjective:
    """x_σ = (1−σ)x + σε, target ε − x, t = 1000σ. σ of each visit comes from its own counter stream."""

    def __init__(
        self, scheduler: Mapping[str, Any], options: LossOptions, flux: FluxOptions, *, seed: int, patch: int
    ) -> None:
        """`patch`: latents along a token's side, for the shift that follows the number of tokens."""
        self._scheduler = scheduler
        self._options = options
        self._is_fast = flux.flux_fast_schedule
        self._seed = seed
        self._patch = patch

    def draw(self, latents_BCHW: Tensor, visits: Sequence[tuple[str, int]], *, step: int, first: int) -> Noised:
        """Noise and level of each visit; `step` and `first` do not matter: nothing is stratified."""
        noise = sample_noise(latents_BCHW.shape, self._seed, "noise", visits)
        return self.at_levels(latents_BCHW, noise, self._levels(latents_BCHW.shape, visits))

    def timesteps(self, shape: torch.Size, visits: Sequence[tuple[str, int]], *, step: int, first: int) -> Tensor:
        """t of each visit for latents of this shape; `step` and `first` do not matter."""
        return 1000 * torch.tensor(self._levels(shape, visits), dtype=torch.float32)

    def at_levels(self, latents_BCHW: Tensor, noise_BCHW: Tensor, levels_B: Sequence[float]) -> Noised:
        """Given noise at given σ."""
        x = latents_BCHW.float()
        level_B = torch.tensor(levels_B, dtype=torch.float32)
        level = level_B.view(-1, 1, 1, 1)
        ratio_B = level_B / (1 - level_B).clamp(min=1e-6)
        noisy = (1 - level) * x + level * noise_BCHW
        return Noised(noisy, noise_BCHW - x, 1000 * level_B, torch.ones_like(level_B), level_B, ratio_B)

    def shift(self, shape: torch.Size) -> float:
        """s of σ ← sσ/(1+(s−1)σ): the option's, or e^μ for the target's number of tokens."""
        if not self._options.flow_schedule_auto_shift:
            return self._options.flow_schedule_shift or 1.0
        tokens = shape[-2] * shape[-1] // self._patch**2
        return math.exp(sampler_mu(self._scheduler, tokens))

    def _levels(self, shape: torch.Size, visits: Sequence[tuple[str, int]]) -> list[float]:
        """σ of each visit, shifted."""
        levels = [self._level(sample, visit) for sample, visit in visits]
        if self._is_fast:
            return levels
        shift = self.shift(shape)
        return [shift * level / (1 + (shift - 1) * level) for level in levels]

    def _level(self, sample: str, visit: int) -> float:
        options = self._options
        uniform = u("sigma", self._seed, sample, visit)
        if self._is_fast:
            return _FAST_LEVELS[int(uniform * len(_FAST_LEVELS))]
        if options.flow_use_uniform_schedule:
            return uniform
        if options.flow_use_beta_schedule:
            generator = np.random.Generator(np.random.Philox(key=key_seed("sigma", self._seed, sample, visit)))
            return float(generator.beta(options.flow_beta_schedule_alpha, options.flow_beta_schedule_beta))
        normal = NormalDist().inv_cdf(min(max(uniform, 2**-60), 1 - 2**-53))
        return 1 / (1 + math.exp(-options.flow_sigmoid_scale * normal))


def sampler_mu(scheduler: Mapping[str, Any], tokens: int) -> float:
    """μ of the repository's scheduler for a number of tokens: linear between its two ends."""
    least, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return low + (tokens - least) * (high - low) / (most - least)
