"""Counts the bytes of tensors that are alive, so that a rehearsal without memory knows what the run will need."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Every storage that an operation makes counts from then on until nothing holds it: as much as an allocator
    without rounding would have given out."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        # Weak references of the mode to parameters: modules that have them cannot be cast or moved.
        self._references = fake.fake_tensor_converter.meta_converter.tensor_memo
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> None:
        """A new peak from here."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._references.clear()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage: Any = tensor.untyped_storage()
        name: int = storage._cdata
        if name in self._known:
            return
        size: int = storage.nbytes()
        self._known[name] = weakref.ref(storage, lambda _: self._forget(name, size))
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, name: int, size: int) -> None:
        del self._known[name]
        self.live_bytes -= size


@contextmanager
def rehearsal() -> Generator[Meter]:
    """Inside, tensors have shapes and types but no content, whatever makes them; no random number is drawn."""
    with torch.random.fork_rng([]), FakeTensorMode(allow_non_fake_inputs=True) as fake, Meter(fake) as meter:
        yield meter
