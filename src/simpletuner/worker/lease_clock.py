"""When a runner must stop, so that nobody else can have the job while its trainer still writes (api.md §5)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from simpletuner.process import boottime

STOP_AT = 4 / 5
KILL_AT = 19 / 20


class LeaseClock:
    """Counts from when the last renewal that succeeded was *sent*. The server's lease ends later. From any thread."""

    def __init__(self, lease_s: float, sent_at: float, clock: Callable[[], float] = boottime) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._sent_at = sent_at
        self._lost = False

    def renewed(self, sent_at: float) -> None:
        with self._lock:
            self._sent_at = max(self._sent_at, sent_at)

    def lose(self) -> None:
        """The server said that it is another's."""
        with self._lock:
            self._lost = True

    @property
    def is_lost(self) -> bool:
        return self._lost

    @property
    def age_s(self) -> float:
        with self._lock:
            return self._clock() - self._sent_at

    def due(self) -> Literal["stop", "kill"] | None:
        """What must be done to the trainer now."""
        if self._lost:
            return "kill"
        share = self.age_s / self._lease_s
        if share >= KILL_AT:
            return "kill"
        return "stop" if share >= STOP_AT else None
