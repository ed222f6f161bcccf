"""A file that is read through requests for parts of it."""

from __future__ import annotations

import io
from collections.abc import Callable

FIRST_BLOCK = 32 << 10
_LARGEST_BLOCK = 8 << 20

Fetch = Callable[[int, int], bytes]
"""(first byte, number of bytes) → exactly these bytes."""


class RangedFile(io.RawIOBase):
    """Reads ahead twice as far each time that it is read on: a header costs one small request, a whole file few."""

    def __init__(self, num_bytes: int, fetch: Fetch) -> None:
        super().__init__()
        self._num_bytes = num_bytes
        self._fetch = fetch
        self._place = 0
        self._block = b""
        self._block_start = 0
        self._ahead = FIRST_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._num_bytes}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = min(len(buffer), self._num_bytes - self._place)
        if wanted <= 0:
            return 0
        offset = self._place - self._block_start
        if not 0 <= offset < len(self._block):
            self._load(wanted)
            offset = 0
        part = self._block[offset : offset + wanted]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)

    def _load(self, wanted: int) -> None:
        is_next = self._place == self._block_start + len(self._block)
        self._ahead = min(2 * self._ahead, _LARGEST_BLOCK) if is_next and self._block else FIRST_BLOCK
        length = min(max(wanted, self._ahead), self._num_bytes - self._place)
        self._block, self._block_start = self._fetch(self._place, length), self._place
