"""Carries the outbox of webhooks to its endpoints: in order for each, all of them side by side.

It lives on a thread of its own with its own event loop: whatever hangs there holds up neither requests nor jobs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from simpletuner.jobs.event_view import EventView
from simpletuner.jobs.webhook_post import Outcome, Poster
from simpletuner.store.webhooks import DeliveryRow, WebhookStore

log = logging.getLogger(__name__)

POLL_S = 0.5
CLOSE_S = 5.0
MOST_LOOKUPS = 64
REST_S = 60.0
"""For an endpoint whose outbox cannot be read or written, such as on a full disk."""
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 600.0
LONGEST_RETRY_AFTER_S = 3600.0
GIVE_UP_S = 24 * 3600.0


class Courier:
    """`refill` is called before each look at the outbox; `may_deliver` asks whether a job's posts are ours to make.

    `clock` gives Unix seconds.
    """

    def __init__(
        self,
        outbox: WebhookStore,
        poster: Poster,
        jobs_root: Path,
        *,
        refill: Callable[[], object] = lambda: None,
        may_deliver: Callable[[str], bool] = lambda job_id: True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox = outbox
        self._poster = poster
        self._view = EventView(jobs_root, "inline")
        self._refill = refill
        self._may_deliver = may_deliver
        self._clock = clock
        self._started_s = clock()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._resting: dict[int, float] = {}
        self._closing = threading.Event()
        self._flush_s = 0.0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._closing.clear()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="webhooks", daemon=True)
        self._thread.start()

    def close(self, *, flush_s: float = 0.0) -> None:
        """End, after at most `flush_s` seconds in which the outbox may empty. What is left stays there."""
        self._flush_s = flush_s
        self._closing.set()
        if self._thread is not None:
            # A name server that hangs must not hold up the end: the thread is a daemon.
            self._thread.join(flush_s + CLOSE_S)

    async def deliver_due(self) -> None:
        """One round: everything that is due, until each endpoint has all or has failed."""
        self._start_due()
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))
            await asyncio.sleep(0)

    async def _run(self) -> None:
        # Names are resolved on threads: those that hang must leave room for the others.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MOST_LOOKUPS, "webhook-names"))
        while not self._closing.is_set():
            self._look()
            await self._pause(POLL_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._flush_s):
                await self._flush()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _flush(self) -> None:
        if not self._flush_s:
            return
        self._look()
        while any(self._may_deliver(job_id) for job_id in self._outbox.pending_jobs()):
            await asyncio.sleep(POLL_S / 10)
            self._look()

    async def _pause(self, duration_s: float) -> None:
        """In short pieces: nothing is woken from another thread."""
        end_s = time.monotonic() + duration_s
        while not self._closing.is_set() and time.monotonic() < end_s:
            await asyncio.sleep(POLL_S / 10)

    def _look(self) -> None:
        try:
            self._refill()
            self._start_due()
        except (SQLAlchemyError, OSError):
            log.exception("The outbox of webhooks cannot be read now")

    def _start_due(self) -> None:
        now_s = self._clock()
        for webhook_id, job_id in self._outbox.due(now_s).items():
            busy = webhook_id in self._tasks or self._resting.get(webhook_id, 0.0) > now_s
            if not busy and self._may_deliver(job_id):
                task = asyncio.create_task(self._deliver_all(webhook_id))
                self._tasks[webhook_id] = task
                task.add_done_callback(lambda task, webhook_id=webhook_id: self._end(webhook_id, task))

    def _end(self, webhook_id: int, task: asyncio.Task[None]) -> None:
        """A delivery that breaks our own code counts as failed: the other endpoints go on, and it ends some day."""
        del self._tasks[webhook_id]
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        log.error("Delivering to webhook %s failed", webhook_id, exc_info=error)
        if isinstance(error, SQLAlchemyError):
            self._resting[webhook_id] = self._clock() + REST_S
        elif delivery := self._outbox.head(webhook_id):
            self._settle(delivery, Outcome(error=f"{type(error).__name__}: {error}"))

    async def _deliver_all(self, webhook_id: int) -> None:
        """Until one is to be tried again later."""
        while (delivery := self._outbox.head(webhook_id)) and delivery.next_s <= self._clock():
            if delivery.event is None:
                outcome = Outcome(error="The event is gone.", refused=True)
            else:
                outcome = await self._poster.post(delivery.endpoint, self._view.show(delivery.event), delivery.id)
            self._settle(delivery, outcome)

    def _settle(self, delivery: DeliveryRow, outcome: Outcome) -> None:
        next_s = now_s = self._clock()
        if outcome.delivered:
            status = "delivered"
        elif outcome.refused or now_s - max(delivery.created_s, self._started_s) >= GIVE_UP_S:
            status = "dead"
            log.warning("Webhook %s gave up event %s: %s", *_names(delivery), outcome.error)
        else:
            status = "pending"
            next_s += retry_after_s(delivery.attempts + 1, outcome)
            if delivery.attempts == 0:
                log.warning("Webhook %s did not take event %s, more tries follow: %s", *_names(delivery), outcome.error)
        self._outbox.record(delivery, status, next_s=next_s, last_status=outcome.status, last_error=outcome.error)


def retry_after_s(attempts: int, outcome: Outcome) -> float:
    """Seconds to wait after `attempts` failures; an endpoint may ask for more."""
    doubled = FIRST_RETRY_S * 2 ** min(attempts - 1, 20)
    return max(min(doubled, LAST_RETRY_S), min(outcome.retry_after_s, LONGEST_RETRY_AFTER_S))


def _names(delivery: DeliveryRow) -> tuple[str, int]:
    return delivery.endpoint.shown_url, delivery.event_index
