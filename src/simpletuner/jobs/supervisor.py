"""The one who changes the status of jobs: a task of the server that looks after them all."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

from simpletuner.errors import UserError
from simpletuner.job import ACTIVE, JobStatus
from simpletuner.jobs.executor import Executor
from simpletuner.jobs.feed import Feed
from simpletuner.jobs.placement import Placement
from simpletuner.jobs.preemption import Preempt
from simpletuner.jobs.watch import Watch, end_command
from simpletuner.store.event_row import StoredEvent
from simpletuner.store.job_row import JobRow, Move
from simpletuner.store.store import Store

log = logging.getLogger(__name__)

ACTIVE_TICK_S = 0.1
IDLE_TICK_S = 1.0
PLAN_EVERY_S = 1.0
PLAN_SHARE = 10
STALLED_AFTER_S = 10.0
STRONGER = {("yield", "stop"), ("yield", "cancel"), ("stop", "cancel")}


class Supervisor:
    """`tick` does one round; `run` repeats it on the event loop. Requests come from any thread."""

    def __init__(
        self,
        store: Store,
        executor: Executor,
        placement: Placement,
        feed: Feed,
        *,
        clock: Callable[[], float] = time.monotonic,
        each_second: Callable[[], bool] = lambda: False,
    ) -> None:
        """`each_second` looks after workers; whether the queue is to be planned anew."""
        self._store = store
        self._executor = executor
        self._placement = placement
        self._feed = feed
        self._clock = clock
        self._each_second = each_second
        self._last_second = float("-inf")
        self._watch = Watch(store, placement.executor_of, clock)
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._awake = asyncio.Event()
        self._closing = False
        self._last_tick = clock()
        self._last_plan = float("-inf")
        self._plan_took_s = 0.0
        self._requested = False
        self._num_active = 0
        self._failing: dict[str, type[Exception]] = {}

    @contextmanager
    def exclusive(self) -> Generator[Placement]:
        """Nothing is placed, ended or accepted by anybody else meanwhile."""
        with self._lock:
            self._requested = True
            yield self._placement

    def tick(self) -> list[StoredEvent]:
        """Look at every unfinished job, plan the queue, relay the outbox. Returns the newly stored events."""
        fresh: list[StoredEvent] = []
        with self._lock:
            self._executor.reap()
            active = self._store.jobs.with_status(ACTIVE)
            for job in active:
                self._guard(f"looking at job {job.job_id}", self._observe, job, fresh)
            self._guard("looking at workers", self._look_at_workers)
            still_active = self._store.jobs.with_status(ACTIVE)
            if self._plan_is_due(changed=len(still_active) != len(active)):
                self._guard("planning the queue", self._placement.place)
                self._plan_took_s = self._clock() - self._last_plan
            for each in self._placement.take_yields():
                self._guard(f"having job {each.job_id} yield", self._make_room, each)
            self._guard("relaying events", self._relay, fresh)
            self._num_active = len(self._store.jobs.with_status(ACTIVE))
            self._last_tick = self._clock()
        return fresh

    def _look_at_workers(self) -> None:
        if self._clock() - self._last_second >= PLAN_EVERY_S:
            self._last_second = self._clock()
            self._requested |= self._each_second()

    def _plan_is_due(self, *, changed: bool) -> bool:
        """At every end and request, and each second: priorities age, and memory that others hold comes free.

        With nothing new, plans of many thousands of jobs take no more than a tenth of the time.
        """
        now = self._clock()
        pause_s = max(PLAN_EVERY_S, PLAN_SHARE * self._plan_took_s)
        if not (changed or self._requested or now - self._last_plan >= pause_s):
            return False
        self._requested = False
        self._last_plan = now
        return True

    def request_end(self, job_id: str, mode: str, *, reason: str | None = None) -> JobRow:
        """Stop, cancel or yield `job_id`: at once where nothing runs, else by asking. Returns the job as it is then.

        A job that ended already, or is already being ended as strongly, is left as it is.
        """
        with self._lock:
            job = self._job(job_id)
            if job.status in {JobStatus.QUEUED, JobStatus.BLOCKED}:
                self._move(job, JobStatus.CANCELLED, mode, "Cancelled before it started")
            elif job.status in {JobStatus.STARTING, JobStatus.RUNNING}:
                self._move(job, JobStatus.STOPPING, mode, reason or f"Asked to {mode}")
                self._send(job, mode)
            elif (
                job.status is JobStatus.STOPPING
                and job.mode is not None
                and (job.mode, mode) in STRONGER
                and self._store.jobs.override_mode(job_id, from_mode=job.mode, to_mode=mode)
            ):
                self._send(job, mode)
            self.replan()
            return self._job(job_id)

    def _make_room(self, preempt: Preempt) -> None:
        self._store.jobs.set_gave_way(preempt.job_id, preempt.for_job)
        self.request_end(preempt.job_id, "yield", reason=f"Gives way to job {preempt.for_job}")

    def pause(self, job_id: str) -> JobRow:
        """Have a job save, give its devices back and wait in the queue until it is resumed."""
        with self._lock:
            self._store.jobs.set_paused(job_id, True)
            return self.request_end(job_id, "yield")

    def resume(self, job_id: str) -> JobRow:
        with self._lock:
            self._store.jobs.set_paused(job_id, False)
            self.replan()
            return self._job(job_id)

    def approve(self, job_id: str, by: str) -> JobRow:
        """Let a blocked job into the queue. One that is not blocked is left as it is."""
        return self._decide(job_id, JobStatus.QUEUED, f"Approved by {by}")

    def reject(self, job_id: str, reason: str) -> JobRow:
        """End a blocked job before it ran. One that is not blocked is left as it is."""
        return self._decide(job_id, JobStatus.REJECTED, reason)

    def _decide(self, job_id: str, to: JobStatus, reason: str) -> JobRow:
        with self._lock:
            job = self._job(job_id)
            if job.status is JobStatus.BLOCKED:
                move = Move(job_id=job_id, from_=job.status, to=to, attempt=job.attempt, reason=reason)
                self._store.jobs.move(move)
            self.replan()
            return self._job(job_id)

    def replan(self) -> None:
        """What the queue depends on has changed."""
        with self._lock:
            self._requested = True
        self.wake()

    async def run(self) -> None:
        """Until `close`. A round that fails is logged and the next one tried."""
        self._loop = asyncio.get_running_loop()
        while not self._closing:
            fresh = await asyncio.to_thread(self._guarded_tick)
            self._feed.publish(fresh)
            with suppress(TimeoutError):
                async with asyncio.timeout(ACTIVE_TICK_S if self._num_active else IDLE_TICK_S):
                    await self._awake.wait()
            self._awake.clear()

    def wake(self) -> None:
        """Have the next round begin now. From any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._awake.set)

    def close(self) -> None:
        self._closing = True
        self.wake()

    @property
    def is_healthy(self) -> bool:
        return self._clock() - self._last_tick < STALLED_AFTER_S

    def _guarded_tick(self) -> list[StoredEvent]:
        fresh: list[StoredEvent] = []
        self._guard("supervising", lambda: fresh.extend(self.tick()))
        return fresh

    def _guard(self, what: str, step: Callable[..., object], *args: object) -> None:
        """The edge of design law 5: what fails for one job must not stop the others."""
        try:
            step(*args)
        except Exception as error:
            # Ten times a second the same sentence would help nobody, least of all a disk that is full.
            if self._failing.get(what) is not type(error):
                log.exception("Failed while %s", what)
            self._failing[what] = type(error)
        else:
            self._failing.pop(what, None)

    def _observe(self, job: JobRow, fresh: list[StoredEvent]) -> None:
        fresh += self._watch.observe(job, self._placement.job_dir(job.job_id))

    def _relay(self, fresh: list[StoredEvent]) -> None:
        waiting = self._store.outbox.waiting()
        if waiting:
            fresh += self._store.events.relay(event for _, event in waiting)
            self._store.outbox.forget(waiting[-1][0])

    def _move(self, job: JobRow, to: JobStatus, mode: str, reason: str) -> None:
        move = Move(job_id=job.job_id, from_=job.status, to=to, attempt=job.attempt, mode=mode, reason=reason)
        self._store.jobs.move(move)

    def _send(self, job: JobRow, mode: str) -> None:
        self._placement.executor_of(job).send(self._placement.job_dir(job.job_id), end_command(job, mode))

    def _job(self, job_id: str) -> JobRow:
        job = self._store.jobs.get(job_id)
        if job is None:
            raise UserError("unknown_job", f"There is no job {job_id}.")
        return job
