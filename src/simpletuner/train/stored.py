"""Tensors of a file that are read when they are asked for: a state that is loaded is never in memory twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


class StoredTensors(Mapping[str, Tensor]):
    """A safetensors file; each look-up reads the tensor anew, on to `device`."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._device = device
        with self._opened() as file:
            self._names: list[str] = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        # Opened for this tensor alone: pages of an open mapping stay in memory once they were touched.
        with self._opened() as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _opened(self) -> Any:
        return safe_open(self._path, framework="pt", device=str(self._device))


class Below(Mapping[str, Tensor]):
    """The tensors whose names begin with `prefix`, named without it."""

    def __init__(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        self._prefix = prefix
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
