"""Optimizers over flat buffers. training.md §5. Those of other libraries are in `libraries`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.train.adamw import (
    ADAMW_BF16,
    SPAN,
    TORCH_ADAMW,
    AdamWSettings,
    Backend,
    CompiledAdamW,
    adamw_with_rounding,
    factors_of,
)
from simpletuner.train.buffer import Clipping, FlatParameters
from simpletuner.train.libraries import LIBRARIES
from simpletuner.train.library_optim import LibraryOptimizer
from simpletuner.train.rounding import first_counters


class Optimizer(Protocol):
    """Updates one buffer in place. Everything that must survive a restart is in `state`."""

    clips: bool
    """False: it wants gradients as they are, whatever `max_grad_norm` says."""
    own_rate: float | None
    """The rate of every step, where it has no use for the schedule's."""
    slower_because: str | None
    """Why it is not as fast as it could be on this device."""
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
    slower_because: str | None = None
    state: dict[str, Tensor]

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.state.items():
            value.copy_(tensors[name])


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


ROUNDING_CHUNKS: Mapping[str, int] = {"cpu": 2**18, "cuda": 2**24}
"""Elements at a time of plain operations: fp32 temporaries that fit the cache of a CPU core, few launches on a GPU."""


class AdamWStochasticRounding(_OwnOptimizer):
    """AdamW with bf16 weights and moments, arithmetic in fp32, every store rounded stochastically.

    Stochastic rounding keeps the expected value, so updates below bf16's resolution are not lost (arXiv:2010.06192).
    The random bits are a counter stream of (seed, step, element): equal on every device and after any restart.
    """

    def __init__(
        self,
        buffer: FlatParameters,
        settings: AdamWSettings,
        *,
        seed: int,
        chunk: int,
        backend: Backend | None = None,
    ) -> None:
        """`chunk`: so many elements at a time; with a `backend` of torch.compile up to `SPAN`, if that can compile."""
        self._buffer = buffer
        self._settings = settings
        self._seed = seed
        self._chunk = chunk
        self._compiled: CompiledAdamW | None = None
        self.slower_because: str | None = None
        self.state = {
            "exp_avg": torch.zeros_like(buffer.weights),
            "exp_avg_sq": torch.zeros_like(buffer.weights),
        }
        if backend is not None:
            self._try_to_compile(backend)

    @torch.no_grad()
    def step(self, rate: float, step: int, clipping: Clipping) -> None:
        settings, compiled = self._settings, self._compiled
        factors = factors_of(settings, rate, step)
        size = SPAN if compiled else self._chunk
        weights, grads = self._buffer.weights.split(size), self._buffer.grads.split(size)
        first, second = (self.state[name].split(size) for name in ("exp_avg", "exp_avg_sq"))
        chunks = list(zip(weights, grads, first, second, strict=True))
        counters = first_counters(self._seed, step, size, len(chunks))
        for chunk, counter in zip(chunks, counters, strict=True):
            if compiled:
                compiled(chunk, clipping, counter, factors)
            else:
                adamw_with_rounding(*chunk, clipping.scale, clipping.finite, counter, *factors, settings)

    def _try_to_compile(self, backend: Backend) -> None:
        """By a step that changes nothing, so that what goes wrong does so before the first one, and harms nothing."""
        self._compiled = CompiledAdamW(self._settings, backend)
        scalar = torch.ones((), device=self._buffer.weights.device)
        try:
            self.step(0.0, 0, Clipping(scalar, scalar, scalar == 0))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            # No compiler, no Triton, a version of them that does not fit: torch wraps them in RuntimeErrors of its own.
            self._compiled = None
            self.slower_because = " ".join(str(error).strip().partition("\n\n")[0].split())


def _adamw_bf16(buffer: FlatParameters, seed: int) -> Optimizer:
    if buffer.weights.dtype is not torch.bfloat16:
        return FusedAdamW(buffer, ADAMW_BF16)
    device = buffer.weights.device.type
    backend = "inductor" if device == "cuda" else None
    chunk = ROUNDING_CHUNKS.get(device, ROUNDING_CHUNKS["cuda"])
    return AdamWStochasticRounding(buffer, ADAMW_BF16, seed=seed, chunk=chunk, backend=backend)


def _library(name: str) -> Callable[[FlatParameters, int], Optimizer]:
    return lambda buffer, seed: LibraryOptimizer(name, LIBRARIES[name], buffer, seed)


OPTIMIZERS: Mapping[str, Callable[[FlatParameters, int], Optimizer]] = {
    "adamw_bf16": _adamw_bf16,
    "torch-adamw": lambda buffer, seed: FusedAdamW(buffer, TORCH_ADAMW),
    **{name: _library(name) for name in LIBRARIES},
}


_STREAM = 2**32
"""More than a seed can be."""


def build_optimizers(
    name: str, buffers: list[FlatParameters], seed: int, warn: Callable[[str, str], None] | None = None
) -> list[Optimizer]:
    """One per buffer. Raises `optimizer_unavailable` where a library or a device is missing.

    `warn` gets code and message where one is slower than it could be.
    """
    built = [OPTIMIZERS[name](buffer, seed + buffer.stream * _STREAM) for buffer in buffers]
    reason = next((optimizer.slower_because for optimizer in built if optimizer.slower_because), None)
    if reason and warn is not None:
        message = f"{name} runs as many small operations, not as one compiled kernel, and is slower: {reason}"
        warn("optimizer_not_compiled", message)
    return built
