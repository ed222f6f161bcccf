"""Trying again what fails for a while: servers that are busy, lines that are cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from simpletuner.errors import UserError

T = TypeVar("T")
_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class Passing(UserError):
    """A failure that may be gone in a moment."""


class Retry:
    """Waits longer each time; what still fails after the last wait is raised."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep, delays_s: Sequence[float] = _DELAYS_S) -> None:
        self._sleep = sleep
        self._delays_s = delays_s

    def __call__(self, act: Callable[[], T]) -> T:
        for delay in self._delays_s:
            try:
                return act()
            except Passing:
                self._sleep(delay)
        return act()
