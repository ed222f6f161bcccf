"""Optimizers over flat buffers. training.md §5. Those of other libraries are in `libraries`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from simpletuner.train.adamw import ADAMW_BF16, TORCH_ADAMW, FusedAdamW, rounded_adamw
from simpletuner.train.buffer import Clipping, FlatParameters
from simpletuner.train.elementwise import CHUNKS, ElementwiseOptimizer, Rule
from simpletuner.train.libraries import LIBRARIES
from simpletuner.train.library_optim import LibraryOptimizer
from simpletuner.train.lion import lion_rule


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


def _elementwise(buffer: FlatParameters, rule: Rule, seed: int) -> Optimizer:
    device = buffer.weights.device.type
    backend = "inductor" if device == "cuda" else None
    chunk = CHUNKS.get(device, CHUNKS["cuda"])
    return ElementwiseOptimizer(buffer, rule, seed=seed, chunk=chunk, backend=backend)


def _adamw_bf16(buffer: FlatParameters, seed: int) -> Optimizer:
    if buffer.weights.dtype is not torch.bfloat16:
        return FusedAdamW(buffer, ADAMW_BF16)
    return _elementwise(buffer, rounded_adamw(ADAMW_BF16), seed)


def _library(name: str) -> Callable[[FlatParameters, int], Optimizer]:
    return lambda buffer, seed: LibraryOptimizer(name, LIBRARIES[name], buffer, seed)


OPTIMIZERS: Mapping[str, Callable[[FlatParameters, int], Optimizer]] = {
    "adamw_bf16": _adamw_bf16,
    "torch-adamw": lambda buffer, seed: FusedAdamW(buffer, TORCH_ADAMW),
    "optimi-lion": lambda buffer, seed: _elementwise(buffer, lion_rule(buffer.weights.dtype), seed),
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
