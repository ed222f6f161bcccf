"""Which workers live and what they are free for (api.md §5, statuses). What need not outlive a server is in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy.exc import OperationalError

from simpletuner.events import utc_now
from simpletuner.jobs.bell import Bell
from simpletuner.jobs.worker_slot import WorkerSlot, WorkerStatus, WorkerTimers
from simpletuner.process import boottime
from simpletuner.store.store import Store
from simpletuner.store.workers import WorkerRow

CONNECT_S = 300.0
"""In which a worker that has registered must ask for work."""
REST_S = 15.0
"""How long one is left alone that did not take what it was given."""
FORGET_S = 3600.0
"""After which an ephemeral worker that is offline is removed."""

PROVEN: frozenset[WorkerStatus] = frozenset({"idle", "busy", "draining"})
"""What no worker is that has yet to live down a lost lease."""


@dataclass(slots=True)
class _Pulse:
    """Times of one clock; None where it never was."""

    seen_at: float | None = None
    registered_at: float | None = None
    asks: bool = False
    """Whether it has asked for work since it registered."""
    idle_since: float = 0.0
    rests_until: float = float("-inf")
    proves_from: float | None = None
    """Since when a quarantined one has been heard without a pause."""
    offline_since: float | None = None
    said: WorkerStatus | None = None
    told_drain: bool = False
    load: dict[str, float] = field(default_factory=dict[str, float])


class Fleet:
    """From any thread. A worker is heard by every call that its token proves."""

    def __init__(self, store: Store, timers: WorkerTimers, clock: Callable[[], float] = boottime) -> None:
        self._store = store
        self.timers = timers
        self._clock = clock
        self._lock = threading.RLock()
        now = clock()
        # A server that starts takes those that were connected for living, and waits until they ask for work again.
        self._pulses = {
            worker.worker_id: _Pulse(seen_at=now, registered_at=now)
            for worker in store.workers.all()
            if worker.connected_at is not None
        }
        self.bell = Bell()

    def seen(self, worker_id: str) -> None:
        with self._lock:
            pulse = self._pulse(worker_id)
            now = self._clock()
            if pulse.seen_at is None or now - pulse.seen_at >= self.timers.lease_s:
                pulse.proves_from = now
                pulse.idle_since = now
            pulse.seen_at = now
            pulse.proves_from = pulse.proves_from or now

    def registered(self, worker_id: str) -> None:
        with self._lock:
            self.seen(worker_id)
            pulse = self._pulse(worker_id)
            pulse.registered_at, pulse.asks, pulse.told_drain = self._clock(), False, False

    def asks(self, worker_id: str) -> None:
        """It has its stream or its poll open."""
        with self._lock:
            self.seen(worker_id)
            pulse = self._pulse(worker_id)
            if not pulse.asks:
                pulse.asks, pulse.idle_since = True, self._clock()

    def left(self, worker_id: str) -> None:
        """It said good-bye."""
        with self._lock:
            pulse = self._pulse(worker_id)
            pulse.seen_at, pulse.asks = None, False

    def rest(self, worker_id: str) -> None:
        """It refused an assignment or never answered: last in line, and not before a while."""
        with self._lock:
            pulse = self._pulse(worker_id)
            pulse.rests_until = pulse.idle_since = self._clock() + REST_S

    def freed(self, worker_id: str) -> None:
        """Its job has ended."""
        with self._lock:
            self._pulse(worker_id).idle_since = self._clock()

    def quarantine(self, worker_id: str) -> None:
        """It lost a lease: nothing until it was heard for as long as a lease is."""
        self._store.workers.change(worker_id, quarantined=True)
        with self._lock:
            self._pulse(worker_id).proves_from = None

    def wake(self, worker_id: str) -> None:
        """Its open stream or poll looks for messages now."""
        self.bell.ring(worker_id)

    def status(self, worker: WorkerRow, *, busy: bool | None = None) -> WorkerStatus:
        """`busy`: whether it has an assignment, where that is known."""
        if busy is None:
            busy = bool(self._store.assignments.live(worker.worker_id))
        with self._lock:
            return self._status(worker, busy=busy)

    def slots(self) -> list[WorkerSlot]:
        """Every worker that ever registered, offline ones too."""
        rows = [worker for worker in self._store.workers.all() if worker.gpu_info is not None]
        if not rows:
            return []
        busy = {assignment.worker_id for assignment in self._store.assignments.live()}
        with self._lock:
            return [self._slot(worker, busy=worker.worker_id in busy) for worker in rows]

    def round(self) -> bool:
        """Told once a second: says what changed, ends quarantines, forgets the ephemeral. Whether anything did."""
        changed = False
        busy = {assignment.worker_id for assignment in self._store.assignments.live()}
        for worker in self._store.workers.all():
            with self._lock:
                pulse = self._pulse(worker.worker_id)
                status = self._status(worker, busy=worker.worker_id in busy)
                was = pulse.said
                now = self._clock()
                pulse.offline_since = (pulse.offline_since or now) if status == "offline" else None
                gone = pulse.offline_since is not None and now - pulse.offline_since >= FORGET_S
            if worker.quarantined and status in PROVEN:
                self._store.workers.change(worker.worker_id, quarantined=False)
            if was != status and not (was is None and status == "offline"):
                self._store.workers.announce(worker, status, was)
                changed = True
            # Only now: what a full disk kept from being told is told later.
            pulse.said = status
            if gone and worker.worker_type == "ephemeral" and worker.worker_id not in busy:
                self.forget(worker.worker_id)
        return changed

    def forget(self, worker_id: str) -> None:
        self._store.workers.delete(worker_id)
        with self._lock:
            self._pulses.pop(worker_id, None)
        self.wake(worker_id)

    def tell_drain(self, worker_id: str) -> bool:
        """Whether it must still be told that it drains: once for each time that it asks anew."""
        with self._lock:
            pulse = self._pulse(worker_id)
            pulse.told_drain, was = True, pulse.told_drain
            return not was

    def told_anew(self, worker_id: str) -> None:
        """Whether it drains has changed."""
        with self._lock:
            self._pulse(worker_id).told_drain = False
        self.wake(worker_id)

    def load(self, worker_id: str) -> dict[str, float]:
        """What its last heartbeat said of its accelerators."""
        with self._lock:
            return dict(self._pulse(worker_id).load)

    def beat(self, worker_id: str, *, utilization: float | None = None, used_gb: float | None = None) -> None:
        """The time is for people to read: a disk that is full must not end anything."""
        self.seen(worker_id)
        told = {"gpu_utilization": utilization, "vram_used_gb": used_gb}
        with self._lock:
            self._pulse(worker_id).load = {name: value for name, value in told.items() if value is not None}
        with suppress(OSError, OperationalError):
            self._store.workers.change(worker_id, last_heartbeat=utc_now())

    def _pulse(self, worker_id: str) -> _Pulse:
        return self._pulses.setdefault(worker_id, _Pulse())

    def _status(self, worker: WorkerRow, *, busy: bool) -> WorkerStatus:
        pulse, now = self._pulse(worker.worker_id), self._clock()
        silent = pulse.seen_at is None or now - pulse.seen_at >= self.timers.lease_s
        if worker.gpu_info is None or silent:
            return "offline"
        if not pulse.asks:
            return "connecting" if now - (pulse.registered_at or 0.0) < CONNECT_S else "offline"
        if worker.quarantined and (pulse.proves_from is None or now - pulse.proves_from < self.timers.lease_s):
            return "quarantined"
        if worker.draining:
            return "draining"
        return "busy" if busy or now < pulse.rests_until else "idle"

    def _slot(self, worker: WorkerRow, *, busy: bool) -> WorkerSlot:
        memory_gb = float((worker.gpu_info or {}).get("vram_gb") or 0)
        return WorkerSlot(
            worker_id=worker.worker_id,
            name=worker.name,
            num_devices=worker.num_devices,
            status=self._status(worker, busy=busy),
            labels=worker.all_labels,
            memory_bytes=round(memory_gb * 2**30) or None,
            idle_since=self._pulse(worker.worker_id).idle_since,
        )
