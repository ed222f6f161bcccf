"""AdamW: on bf16 tensors with every store rounded stochastically, on others by torch's fused kernel. docs/adr/0025."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from simpletuner.train.buffer import Clipping, FlatParameters
from simpletuner.train.elementwise import OwnOptimizer, Rule
from simpletuner.train.rounding import store_rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """Decoupled weight decay (arXiv:1711.05101)."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


ADAMW_BF16 = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-6, weight_decay=0.01)
TORCH_ADAMW = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01)


def rounded_adamw(settings: AdamWSettings) -> Rule:
    """AdamW with bf16 weights and moments, arithmetic in fp32, every store rounded stochastically.

    Stochastic rounding keeps the expected value, so updates below bf16's resolution are not lost (arXiv:2010.06192).
    The random bits are a counter stream of (seed, step, element): equal on every device and after any restart.
    """
    return Rule(
        state=("exp_avg", "exp_avg_sq"),
        factors=partial(factors_of, settings),
        change=partial(adamw_with_rounding, settings=settings),
    )


def factors_of(settings: AdamWSettings, rate: float, step: int) -> tuple[float, float, float]:
    """What is the same for all elements in the 0-based step k = t − 1: 1 − η·λ, −η ÷ (1 − β₁ᵗ), √(1 − β₂ᵗ)."""
    correction1 = 1 - settings.beta1 ** (step + 1)
    correction2 = 1 - settings.beta2 ** (step + 1)
    return 1 - rate * settings.weight_decay, -rate / correction1, math.sqrt(correction2)


def adamw_with_rounding(
    weights: Tensor,
    grads: Tensor,
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    finite: Tensor,
    counter: int | Tensor,
    decay: float | Tensor,
    rate: float | Tensor,
    correction2: float | Tensor,
    settings: AdamWSettings,
) -> None:
    """One step on bf16 tensors, (N,) each, in place: arithmetic in fp32, every store rounded stochastically.

    The gradients count times `scale`; where not `finite` nothing changes. `counter` as of `store_rounded`, the next
    three as of `factors_of`. Operations are in place, so that they are quick one by one on a CPU.
    """
    g = grads.float().mul_(scale)
    m = first.float().lerp_(g, 1 - settings.beta1)
    v = second.float().mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
    change = (m * rate).div_(v.sqrt().div_(correction2).add_(settings.epsilon))
    w = weights.float().mul_(decay).add_(change)
    store_rounded((w, m, v), (weights, first, second), counter, finite)


class FusedAdamW(OwnOptimizer):
    """torch's fused kernel on the whole buffer, state in the buffer's type."""

    def __init__(self, buffer: FlatParameters, settings: AdamWSettings) -> None:
        super().__init__(buffer)
        self._settings = settings
        self._rate = 0.0
        self.state = {
            "exp_avg": torch.zeros_like(buffer.weights),
            "exp_avg_sq": torch.zeros_like(buffer.weights),
            "steps": torch.zeros((), dtype=torch.float32, device=buffer.weights.device),
        }

    def begin(self, rate: float, step: int, finite: Tensor | None = None) -> None:
        self._rate = rate
        self.state["steps"].add_(1.0 if finite is None else finite)

    @torch.no_grad()
    def step_part(self, start: int, grads: Tensor, clipping: Clipping) -> None:
        settings, stop = self._settings, start + len(grads)
        torch._fused_adamw_(  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportPrivateImportUsage]
            [self._buffer.weights[start:stop]],
            [grads],
            [self.state["exp_avg"][start:stop]],
            [self.state["exp_avg_sq"][start:stop]],
            [],
            [self.state["steps"]],
            lr=self._rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            eps=settings.epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=clipping.scale.reciprocal(),
            found_inf=(~clipping.finite).float(),
        )
