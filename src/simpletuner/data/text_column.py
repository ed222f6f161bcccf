"""Many short texts in one piece of memory: a Python string takes 49 bytes and a pointer beside its characters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

_CODEC = "utf-8", "surrogatepass"
"""Names of files that are no UTF-8 come with lone surrogates."""


class TextColumn(Sequence[str]):
    """Immutable. A text takes its UTF-8 bytes and 4 more, 8 in columns beyond 4 GiB; each look makes a new string."""

    __slots__ = ("_bytes", "_ends")

    def __init__(self, texts: Iterable[str] = ()) -> None:
        encoded = [text.encode(*_CODEC) for text in texts]
        self._bytes = b"".join(encoded)
        kind = np.uint32 if len(self._bytes) < 2**32 else np.int64
        self._ends = np.zeros(len(encoded) + 1, kind)
        """Text n lies in `_bytes[_ends[n]:_ends[n + 1]]`."""
        np.cumsum([len(text) for text in encoded], out=self._ends[1:])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._at(place) for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self._at(place)

    def __iter__(self) -> Iterator[str]:
        ends = self._ends.tolist()
        return (str(self._bytes[start:end], *_CODEC) for start, end in pairwise(ends))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TextColumn):
            return self._bytes == other._bytes and bool(np.array_equal(self._ends, other._ends))
        return NotImplemented if not isinstance(other, list) else list(self) == other

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def nbytes(self) -> int:
        return len(self._bytes) + self._ends.nbytes

    def _at(self, place: int) -> str:
        start, end = self._ends[place : place + 2].tolist()
        return str(self._bytes[start:end], *_CODEC)
