"""Copies of tensors in host memory, which a run may go on without."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor


class HostCopies:
    """Their memory, pinned for a GPU, is taken once and used again by the next copies."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._fresh: set[str] = set()

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held.values())

    @contextmanager
    def making(self) -> Generator[None]:
        """Copies that are kept inside are complete after it."""
        self._fresh.clear()
        yield
        if any(tensor.is_pinned() for tensor in self._held.values()):
            torch.cuda.synchronize()

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """A copy under this name; the first one of it stays until `making` begins again."""
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._held[name] = held
            self._fresh.discard(name)
        if name not in self._fresh:
            self._fresh.add(name)
            held.copy_(tensor.detach(), non_blocking=True)
        return held
