"""Loss on pictures that are never trained on, at fixed noise and fixed noise levels. training.md §7.2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner.data.loader import Batch
from simpletuner.diffusion.loss import Loss
from simpletuner.diffusion.objective import Noised, Objective, sample_noise


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Mean over samples of each sample's mean over levels; the error of that mean from the spread between samples."""

    dataset_id: str
    mean: float
    standard_error: float
    num_samples: int


class HeldOut:
    """`batches` is called for each pass and yields the batches of one dataset, in a fixed order."""

    def __init__(
        self,
        dataset_id: str,
        batches: Callable[[], Sequence[Batch]],
        objective: Objective,
        loss: Loss,
        predict: Callable[[nn.Module, Tensor, Tensor, Batch], Tensor],
        num_levels: int,
    ) -> None:
        self.dataset_id = dataset_id
        self._batches = batches
        self._objective = objective
        self._loss = loss
        self._predict = predict
        self._levels = [(index + 0.5) / num_levels for index in range(num_levels)]

    @torch.inference_mode()
    def measure(self, denoiser: nn.Module) -> HeldOutLoss:
        training = denoiser.training
        denoiser.eval()
        losses: list[float] = []
        for batch in self._batches():
            visits = [(sample, 0) for sample in batch.samples]
            # Keyed by the sample alone: the same noise for every seed, step and run.
            noise = sample_noise(batch.latents_BCHW.shape, 0, "held-out", visits)
            rows = torch.zeros(len(visits))
            for level in self._levels:
                noised = self._objective.at_levels(batch.latents_BCHW, noise, [level] * len(visits))
                predicted = self._predict_on(denoiser, noised, batch)
                rows += self._loss.per_sample(predicted, noised, batch.mask_BHW).cpu()
            losses += (rows / len(self._levels)).tolist()
        denoiser.train(training)
        mean = math.fsum(losses) / len(losses)
        spread = math.fsum((value - mean) ** 2 for value in losses) / max(1, len(losses) - 1)
        return HeldOutLoss(self.dataset_id, mean, math.sqrt(spread / len(losses)), len(losses))

    def _predict_on(self, denoiser: nn.Module, noised: Noised, batch: Batch) -> Tensor:
        return self._predict(denoiser, noised.latents_BCHW, noised.t_B, batch)
