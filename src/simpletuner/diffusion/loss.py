"""Distance between prediction and target, per element; the Huber kinds have a width per sample. training.md §4.2."""

from __future__ import annotations

import torch
from torch import Tensor

from simpletuner.config.training_options import LossOptions
from simpletuner.diffusion.objective import Noised


class Loss:
    """Mean over the non-batch dimensions, times the sample's weight, mean over the batch; fp32, scalar."""

    def __init__(self, options: LossOptions) -> None:
        self._options = options

    def __call__(self, predicted_BCHW: Tensor, noised: Noised, mask_BHW: Tensor | None = None) -> Tensor:
        return (self.per_sample(predicted_BCHW, noised, mask_BHW) * noised.weight_B).mean()

    def per_sample(self, predicted_BCHW: Tensor, noised: Noised, mask_BHW: Tensor | None = None) -> Tensor:
        """Unweighted, shape (B,). The mask multiplies each element; nothing is normalised again."""
        squared = (predicted_BCHW.float() - noised.target_BCHW).square()
        if self._options.loss_type != "l2":
            width = self.width(noised).view(-1, 1, 1, 1)
            factor = 2 * width if self._options.loss_type == "huber" else 2.0
            squared = factor * ((squared + width.square()).sqrt() - width)
        if mask_BHW is not None:
            squared = squared * mask_BHW[:, None]
        return squared.flatten(1).mean(1)

    def width(self, noised: Noised) -> Tensor:
        """c of each sample (B,): constant c₀, c₀^τ, or (1−c₀)/(1+ρ)² + c₀."""
        least = self._options.huber_c
        match self._options.huber_schedule:
            case "constant":
                return torch.full_like(noised.level_B, least)
            case "exponential":
                return least**noised.level_B
            case "snr":
                return (1 - least) / (1 + noised.ratio_B).square() + least
