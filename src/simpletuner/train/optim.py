"""Optimizers over flat buffers. training.md §5. Those of other libraries are in `libraries`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.train.buffer import Clipping, FlatParameters
from simpletuner.train.libraries import LIBRARIES
from simpletuner.train.library_optim import LibraryOptimizer
from simpletuner.train.rounding import noise_bits, round_stochastically


class Optimizer(Protocol):
    """Updates one buffer in place. Everything that must survive a restart is in `state`."""

    clips: bool
    """False: it wants gradients as they are, whatever `max_grad_norm` says."""
    own_rate: float | None
    """The rate of every step, where it has no use for the schedule's."""
    averages: bool
    """It averages the weights in place of a schedule: after the warm-up the rate stays, `averaged` is the result."""

    @property
    def state(self) -> dict[str, Tensor]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a `state` into place. KeyError when a tensor is missing, RuntimeError when one does not fit."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the buffer holds the weights that are to be looked at and kept; then those of training."""
        ...

    def step(self, rate: float, step: int, clipping: Clipping) -> None:
        """`step` is the 0-based optimizer step; where the gradients are not finite nothing may change."""
        ...


class _OwnOptimizer:
    """Clipped, on the schedule, with its state made at once."""

    clips = True
    own_rate: float | None = None
    averages = False
    state: dict[str, Tensor]

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.state.items():
            value.copy_(tensors[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """Decoupled weight decay (arXiv:1711.05101)."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


ADAMW_BF16 = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-6, weight_decay=0.01)
TORCH_ADAMW = AdamWSettings(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01)


class FusedAdamW(_OwnOptimizer):
    """torch's fused kernel on the whole buffer, state in the buffer's type."""

    def __init__(self, buffer: FlatParameters, settings: AdamWSettings) -> None:
        self._buffer = buffer
        self._settings = settings
        self.state = {
            "exp_avg": torch.zeros_like(buffer.weights),
            "exp_avg_sq": torch.zeros_like(buffer.weights),
            "steps": torch.zeros((), dtype=torch.float32, device=buffer.weights.device),
        }

    @torch.no_grad()
    def step(self, rate: float, step: int, clipping: Clipping) -> None:
        settings = self._settings
        found_inf = (~clipping.finite).float()
        self.state["steps"].add_(1.0 - found_inf)
        torch._fused_adamw_(  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportPrivateImportUsage]
            [self._buffer.weights],
            [self._buffer.grads],
            [self.state["exp_avg"]],
            [self.state["exp_avg_sq"]],
            [],
            [self.state["steps"]],
            lr=rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
            eps=settings.epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=clipping.scale.reciprocal(),
            found_inf=found_inf,
        )


class AdamWStochasticRounding(_OwnOptimizer):
    """AdamW with bf16 weights and moments, arithmetic in fp32, every store rounded stochastically.

    Stochastic rounding keeps the expected value, so updates below bf16's resolution are not lost (arXiv:2010.06192).
    The random bits are a counter stream of (seed, step, element): equal on every device and after any restart.
    """

    def __init__(self, buffer: FlatParameters, settings: AdamWSettings, *, seed: int, chunk: int) -> None:
        self._buffer = buffer
        self._settings = settings
        self._seed = seed
        self._chunk = chunk
        self.state = {
            "exp_avg": torch.zeros_like(buffer.weights),
            "exp_avg_sq": torch.zeros_like(buffer.weights),
        }

    @torch.no_grad()
    def step(self, rate: float, step: int, clipping: Clipping) -> None:
        size = self._buffer.weights.numel()
        for start in range(0, size, self._chunk):
            self._step_chunk(slice(start, min(start + self._chunk, size)), rate, step, clipping)

    def _step_chunk(self, part: slice, rate: float, step: int, clipping: Clipping) -> None:
        settings = self._settings
        weights, grads = self._buffer.weights[part], self._buffer.grads[part].float().mul_(clipping.scale)
        first, second = self.state["exp_avg"][part], self.state["exp_avg_sq"][part]
        m = first.float().lerp_(grads, 1 - settings.beta1)
        v = second.float().mul_(settings.beta2).addcmul_(grads, grads, value=1 - settings.beta2)
        correction1 = 1 - settings.beta1 ** (step + 1)
        correction2 = math.sqrt(1 - settings.beta2 ** (step + 1))
        w = weights.float().mul_(1 - rate * settings.weight_decay)
        w.addcdiv_(m, (v.sqrt() / correction2).add_(settings.epsilon), value=-rate / correction1)
        bits = noise_bits(part.start, w.numel(), self._seed, step, w.device)
        for index, (target, value) in enumerate(((weights, w), (first, m), (second, v))):
            rounded = round_stochastically(value, bits, index)
            # Chosen on the device: to look at the flag here would mean to wait for it.
            torch.where(clipping.finite, rounded, target, out=target)


def _adamw_bf16(buffer: FlatParameters, seed: int) -> Optimizer:
    if buffer.weights.dtype is not torch.bfloat16:
        return FusedAdamW(buffer, ADAMW_BF16)
    # A chunk's fp32 temporaries fit the cache of a CPU core; a GPU wants few launches instead.
    chunk = 2**17 if buffer.weights.device.type == "cpu" else 2**24
    return AdamWStochasticRounding(buffer, ADAMW_BF16, seed=seed, chunk=chunk)


def _library(name: str) -> Callable[[FlatParameters, int], Optimizer]:
    return lambda buffer, seed: LibraryOptimizer(name, LIBRARIES[name], buffer, seed)


OPTIMIZERS: Mapping[str, Callable[[FlatParameters, int], Optimizer]] = {
    "adamw_bf16": _adamw_bf16,
    "torch-adamw": lambda buffer, seed: FusedAdamW(buffer, TORCH_ADAMW),
    **{name: _library(name) for name in LIBRARIES},
}


def build_optimizers(name: str, buffers: list[FlatParameters], seed: int) -> list[Optimizer]:
    """One per buffer. Raises `optimizer_unavailable` where a library or a device is missing."""
    return [OPTIMIZERS[name](buffer, seed) for buffer in buffers]
