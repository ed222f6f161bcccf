"""Appends what runners of workers send to the journals and logs of their jobs, each byte once."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from simpletuner.errors import UserError


class Shipments:
    def __init__(self) -> None:
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)

    def append(self, path: Path, content: bytes, offset: int, *, start: int, check: Callable[[], None]) -> int:
        """Returns the next offset. `start`: where this epoch's part begins. `check` raises where it may not write.

        What is there already is not written twice. Raises UserError `offset_mismatch`.
        """
        with self._locks[path]:
            check()
            size = size_of(path)
            if not start <= offset <= size:
                message = f"The next byte of {path.name} is {size}, not {offset}."
                raise UserError("offset_mismatch", message, hint=f"offset {size}")
            fresh = content[size - offset :]
            if fresh:
                with path.open("ab") as file:
                    file.write(fresh)
            return max(size, offset + len(content))


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
