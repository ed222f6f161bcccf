"""Hands stored events to everyone who listens in this process. Lives on one event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress

from simpletuner.store.event_filter import EventFilter
from simpletuner.store.event_row import StoredEvent

QUEUE_EVENTS = 1000
QUEUE_BYTES = 32 * 2**20


class Subscription:
    """A bounded queue of one listener. Past its bounds it is emptied and marked: nobody waits for a slow reader."""

    def __init__(self, wanted: EventFilter) -> None:
        self._wanted = wanted
        self._queue: deque[StoredEvent] = deque()
        self._bytes = 0
        self._ready = asyncio.Event()
        self.overflowed = False
        self.closed = False

    def offer(self, event: StoredEvent) -> None:
        if not self._wanted.accepts(job_id=event.job_id, type_=event.type):
            return
        self._queue.append(event)
        self._bytes += len(event.body)
        if len(self._queue) > QUEUE_EVENTS or self._bytes > QUEUE_BYTES:
            self._empty()
            self.overflowed = True
        self._ready.set()

    def take(self) -> list[StoredEvent]:
        taken = list(self._queue)
        self._empty()
        self._ready.clear()
        return taken

    def restart(self) -> None:
        """Of a reader that goes back to the store for what it missed."""
        self._empty()
        self._ready.clear()
        self.overflowed = False

    async def wait(self, timeout_s: float) -> bool:
        """Whether something came, the feed closed, or the queue ran over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        return self._ready.is_set()

    def close(self) -> None:
        self.closed = True
        self._ready.set()

    def _empty(self) -> None:
        self._queue.clear()
        self._bytes = 0


class Feed:
    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self.is_closed = False

    @contextmanager
    def subscribe(self, wanted: EventFilter) -> Generator[Subscription]:
        subscription = Subscription(wanted)
        self._subscriptions.add(subscription)
        if self.is_closed:
            subscription.close()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def publish(self, events: Iterable[StoredEvent]) -> None:
        for event in events:
            for subscription in self._subscriptions:
                subscription.offer(event)

    @property
    def num_listeners(self) -> int:
        return len(self._subscriptions)

    def close(self) -> None:
        """End every stream, so that a server can go down without waiting for its listeners."""
        self.is_closed = True
        for subscription in self._subscriptions:
            subscription.close()
