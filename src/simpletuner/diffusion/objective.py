"""What the network is asked for: noisy latents, the target, and the weight of each sample. training.md §4.2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from simpletuner.config.training_options import LossOptions
from simpletuner.data.keys import key_seed, u
from simpletuner.diffusion.timesteps import StratifiedTimesteps, timestep_weights

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True, slots=True)
class Noised:
    """A training example: `latents_BCHW` (x_t), `target_BCHW`, `t_B` (int64), `weight_B`, all but t in fp32.

    `level_B` is the position on the schedule in [0, 1] and `ratio_B` noise ÷ signal (ρ): what the Huber widths follow.
    """

    latents_BCHW: Tensor
    target_BCHW: Tensor
    t_B: Tensor
    weight_B: Tensor
    level_B: Tensor
    ratio_B: Tensor

    def to(self, device: torch.device) -> Noised:
        """Copies that the host does not wait for; on the CPU the same object."""
        if device.type == "cpu":
            return self
        return Noised(*(getattr(self, name).pin_memory().to(device, non_blocking=True) for name in self.__slots__))


class Objective(Protocol):
    def draw(self, latents_BCHW: Tensor, visits: Sequence[tuple[str, int]], *, step: int, first: int) -> Noised: ...

    def timesteps(self, shape: torch.Size, visits: Sequence[tuple[str, int]], *, step: int, first: int) -> Tensor:
        """t of each visit, as `draw` has it for latents of this shape."""
        ...

    def at_levels(self, latents_BCHW: Tensor, noise_BCHW: Tensor, levels_B: Sequence[float]) -> Noised: ...


def sample_noise(shape: torch.Size, seed: int, purpose: str, visits: Sequence[tuple[str, int]]) -> Tensor:
    """Standard normal, fp32, CPU, each sample from its own counter stream."""
    noise = torch.empty(shape)
    for row, (sample, visit) in zip(noise, visits, strict=True):
        row.normal_(generator=torch.Generator().manual_seed(key_seed(purpose, seed, sample, visit)))
    return noise


class DiffusionObjective:
    """x_t = √ᾱ·x + √(1−ᾱ)·ε with the betas of the repository's scheduler (DDPM, arXiv:2006.11239).

    Min-SNR-γ weights: arXiv:2303.09556.
    """

    def __init__(
        self,
        scheduler: Mapping[str, Any],
        options: LossOptions,
        *,
        seed: int,
        samples_per_step: int,
        prediction_type: PredictionType | None = None,
    ) -> None:
        alphas = alphas_cumulative(scheduler)
        self.num_timesteps = len(alphas)
        self.prediction_type: PredictionType = prediction_type or scheduler.get("prediction_type", "epsilon")
        self._seed = seed
        self._options = options
        self._signal = torch.from_numpy(np.sqrt(alphas)).float()
        self._noise = torch.from_numpy(np.sqrt(1 - alphas)).float()
        self._ratio = torch.from_numpy(np.sqrt((1 - alphas) / alphas)).float()
        self._weight = torch.from_numpy(min_snr_weight(alphas, options.snr_gamma, self.prediction_type)).float()
        weights = timestep_weights(self.num_timesteps, options)
        self._timesteps = StratifiedTimesteps(weights, seed=seed, samples_per_step=samples_per_step)

    def draw(self, latents_BCHW: Tensor, visits: Sequence[tuple[str, int]], *, step: int, first: int) -> Noised:
        """Noise and timestep of each visit; `first` is the batch's first sample within the optimizer step."""
        noise_BCHW = sample_noise(latents_BCHW.shape, self._seed, "noise", visits)
        if self._options.offset_noise:
            noise_BCHW += self._offset(latents_BCHW.shape, visits)
        t_B = self.timesteps(latents_BCHW.shape, visits, step=step, first=first)
        return self._noised(latents_BCHW, noise_BCHW, t_B)

    def timesteps(self, shape: torch.Size, visits: Sequence[tuple[str, int]], *, step: int, first: int) -> Tensor:
        """t of each visit; `shape` does not matter."""
        return torch.from_numpy(self._timesteps.draw(step, first, visits))

    def at_levels(self, latents_BCHW: Tensor, noise_BCHW: Tensor, levels_B: Sequence[float]) -> Noised:
        """Given noise at given positions in [0, 1) of the schedule: for the held-out loss."""
        t_B = torch.tensor([int(level * self.num_timesteps) for level in levels_B])
        return self._noised(latents_BCHW, noise_BCHW, t_B)

    def _noised(self, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Noised:
        x = latents_BCHW.float()
        signal, noise = self._signal[t_B].view(-1, 1, 1, 1), self._noise[t_B].view(-1, 1, 1, 1)
        match self.prediction_type:
            case "epsilon":
                target = noise_BCHW
            case "v_prediction":
                target = signal * noise_BCHW - noise * x
            case "sample":
                target = x
        noisy = signal * x + noise * noise_BCHW
        return Noised(noisy, target, t_B, self._weight[t_B], t_B / self.num_timesteps, self._ratio[t_B])

    def _offset(self, shape: torch.Size, visits: Sequence[tuple[str, int]]) -> Tensor:
        """One normal number per channel, for the samples whose turn it is."""
        probability = self._options.noise_offset_probability
        chosen = [float(u("offset", self._seed, sample, visit) < probability) for sample, visit in visits]
        offsets = sample_noise(torch.Size((shape[0], shape[1], 1, 1)), self._seed, "offset-noise", visits)
        return offsets * torch.tensor(chosen).view(-1, 1, 1, 1) * self._options.noise_offset


def alphas_cumulative(scheduler: Mapping[str, Any]) -> NDArray[np.float64]:
    """ᾱ in fp64 from a diffusers scheduler configuration."""
    count = int(scheduler.get("num_train_timesteps", 1000))
    start, end = float(scheduler.get("beta_start", 1e-4)), float(scheduler.get("beta_end", 0.02))
    match scheduler.get("beta_schedule", "linear"):
        case "linear":
            betas = np.linspace(start, end, count)
        case "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, count) ** 2
        case "squaredcos_cap_v2":
            steps = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - steps[1:] / steps[:-1], 0.999)
        case other:
            raise ValueError(f"unknown beta_schedule {other!r}")
    return np.cumprod(1 - betas, dtype=np.float64)


def min_snr_weight(
    alphas: NDArray[np.float64], gamma: float | None, prediction_type: PredictionType
) -> NDArray[np.float64]:
    """Loss weight per timestep; ones without gamma."""
    if gamma is None:
        return np.ones_like(alphas)
    snr = alphas / (1 - alphas)
    capped = np.minimum(snr, gamma)
    match prediction_type:
        case "epsilon":
            return np.divide(capped, snr, out=np.ones_like(snr), where=snr > 0)
        case "v_prediction":
            return capped / (snr + 1)
        case "sample":
            return capped
