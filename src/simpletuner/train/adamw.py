"""AdamW on bf16 tensors as one elementwise function: run as plain operations, or compiled to one kernel.

No GPU has run the compiled form: it is proven with Inductor's C++ on a CPU. ADR 0025.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from simpletuner.train.buffer import Clipping
from simpletuner.train.rounding import store_rounded

SPAN = 2**30
"""Elements of one compiled call: their places fit 32 bits, and a counter's period is a multiple of it."""

Backend = Literal["inductor"] | Callable[..., Any]
"""Of torch.compile."""

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weights, gradients, first and second moment, (N,) each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """Decoupled weight decay (arXiv:1711.05101)."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


ADAMW_BF16 = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-6, weight_decay=0.01)
TORCH_ADAMW = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01)


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
    three as of `factors_of`: numbers, or scalar tensors of int32 and fp32, with the same result to the bit. Every
    operation is elementwise, so that a compiler makes one kernel of them; and in place, so that they are quick one by
    one on a CPU.
    """
    g = grads.float().mul_(scale)
    m = first.float().lerp_(g, 1 - settings.beta1)
    v = second.float().mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
    change = (m * rate).div_(v.sqrt().div_(correction2).add_(settings.epsilon))
    w = weights.float().mul_(decay).add_(change)
    store_rounded((w, m, v), (weights, first, second), counter, finite)


class CompiledAdamW:
    """`adamw_with_rounding` through torch.compile. What changes from step to step is a tensor: nothing recompiles."""

    def __init__(self, settings: AdamWSettings, backend: Backend) -> None:
        # One kernel needs no pool of compiling processes beside the trainer.
        options: dict[str, Any] | None = {"compile_threads": 1} if backend == "inductor" else None
        # fullgraph: a break would mean several kernels, and be found by nobody.
        self._update = torch.compile(
            partial(_update, settings=settings), backend=backend, fullgraph=True, options=options
        )

    def __call__(self, parts: Parts, clipping: Clipping, counter: int, factors: tuple[float, float, float]) -> None:
        device = parts[0].device
        # In fp64 the counter is exact too. Pinned, so that the copy makes nobody wait.
        numbers = torch.tensor([counter, *factors], dtype=torch.float64, pin_memory=device.type == "cuda")
        self._update(*parts, clipping.scale, clipping.finite, numbers.to(device, non_blocking=True))


def _update(
    weights: Tensor,
    grads: Tensor,
    first: Tensor,
    second: Tensor,
    scale: Tensor,
    finite: Tensor,
    numbers: Tensor,
    settings: AdamWSettings,
) -> None:
    counter, (decay, rate, correction2) = numbers[0].to(torch.int32), numbers[1:].float().unbind()
    adamw_with_rounding(weights, grads, first, second, scale, finite, counter, decay, rate, correction2, settings)
