"""Exponential moving average of the trained weights, always in fp32. training.md §5."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from simpletuner.train.buffer import FlatParameters


class Ema:
    """One fp32 shadow per buffer. After s updates the decay is min(decay, (1 + s) / (10 + s))."""

    def __init__(self, buffers: list[FlatParameters], decay: float) -> None:
        self._buffers = buffers
        self._decay = decay
        self.updates = 0
        self.elsewhere: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered while the denoiser holds the average: what others have of the weights has to follow."""
        self.shadows = [buffer.weights.float().clone() for buffer in buffers]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        for shadow, buffer in zip(self.shadows, self._buffers, strict=True):
            # The mixed-type addition is computed in fp32, element by element, without a copy of the weights.
            shadow.mul_(decay).add_(buffer.weights, alpha=1 - decay)
        self.updates += 1

    def named_tensors(self, shadows: Sequence[Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The average, or copies of its `shadows`, by parameter name, fp32."""
        for shadow, buffer in zip(shadows or self.shadows, self._buffers, strict=True):
            yield from buffer.named_views(shadow)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """The denoiser holds the average, cast to its own type, inside the block."""
        kept = [buffer.weights.clone() for buffer in self._buffers]
        try:
            for shadow, buffer in zip(self.shadows, self._buffers, strict=True):
                buffer.weights.copy_(shadow)
            with self.elsewhere():
                yield
        finally:
            for weights, buffer in zip(kept, self._buffers, strict=True):
                buffer.weights.copy_(weights)
