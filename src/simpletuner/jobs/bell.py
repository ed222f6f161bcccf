"""Wakes requests that wait for news of a key. Rung from any thread, heard on one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from contextlib import contextmanager


class Bell:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_closed = False
        self._heard: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}

    def ring(self, key: str) -> None:
        with self._lock:
            for loop, event in self._heard.get(key, ()):
                if not loop.is_closed():
                    loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        """End every wait, also those to come: the server goes down."""
        with self._lock:
            self.is_closed = True
            keys = list(self._heard)
        for key in keys:
            self.ring(key)

    def is_heard(self, key: str) -> bool:
        """Whether somebody waits for it."""
        with self._lock:
            return key in self._heard

    @contextmanager
    def listen(self, key: str) -> Generator[asyncio.Event]:
        """Set by every ring from now on. Look for news after this begins, then wait: nothing falls in between."""
        heard = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._heard.setdefault(key, set()).add(heard)
            if self.is_closed:
                heard[1].set()
        try:
            yield heard[1]
        finally:
            with self._lock:
                self._heard[key].discard(heard)
                if not self._heard[key]:
                    del self._heard[key]
