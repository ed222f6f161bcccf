"""Until when workers may work on their jobs. In memory: a full disk must not end a lease.

A server that starts gives every live assignment a whole lease: its runner, whose clock runs from what it sent, has
stopped by then or renews it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from simpletuner.process import boottime
from simpletuner.store.assignments import Assignment

ACK_S = 15.0
"""In which the runner of an assignment must have taken its lease."""
MARGIN_S = 1.0
"""A renewal is counted from its arrival, and the runner counts it from when it was sent."""


@dataclass(slots=True)
class _Lease:
    epoch: int
    worker_id: str
    ends_at: float
    taken: bool = False


class Leases:
    """Of jobs on workers. Once over, a lease cannot be renewed. From any thread."""

    def __init__(
        self, lease_s: float, live: Iterable[Assignment] = (), *, clock: Callable[[], float] = boottime
    ) -> None:
        self.lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        for assignment in live:
            self.offer(assignment)
            if assignment.state == "taken":
                self.take(assignment.job_id, assignment.epoch)

    def offer(self, assignment: Assignment) -> None:
        with self._lock:
            ends_at = self._clock() + ACK_S
            self._leases[assignment.job_id] = _Lease(assignment.epoch, assignment.worker_id, ends_at)

    def take(self, job_id: str, epoch: int) -> bool:
        """By a runner. False when this epoch's is over."""
        return self._extend(job_id, epoch, taking=True)

    def renew(self, job_id: str, epoch: int) -> bool:
        """False when it is over, or was never taken."""
        return self._extend(job_id, epoch, taking=False)

    def is_alive(self, job_id: str, epoch: int | None = None) -> bool:
        """Offered and waited for, or held. With `epoch`, only if it is that one's."""
        with self._lock:
            lease = self._leases.get(job_id)
            return lease is not None and (epoch is None or lease.epoch == epoch) and self._clock() < lease.ends_at

    def is_held(self, job_id: str) -> bool:
        """Whether a runner took it, be it over or not."""
        with self._lock:
            lease = self._leases.get(job_id)
            return lease is not None and lease.taken

    def remaining_s(self, job_id: str) -> float:
        with self._lock:
            lease = self._leases.get(job_id)
            return 0.0 if lease is None else max(0.0, lease.ends_at - self._clock())

    def drop(self, job_id: str) -> None:
        """End it now: a worker is taken away, or refuses."""
        with self._lock:
            if job_id in self._leases:
                self._leases[job_id].ends_at = float("-inf")

    def forget(self, job_id: str) -> str | None:
        """The assignment has ended. Returns whose it was."""
        with self._lock:
            lease = self._leases.pop(job_id, None)
            return None if lease is None else lease.worker_id

    def _extend(self, job_id: str, epoch: int, *, taking: bool) -> bool:
        with self._lock:
            lease = self._leases.get(job_id)
            now = self._clock()
            if lease is None or lease.epoch != epoch or now >= lease.ends_at or not (taking or lease.taken):
                return False
            lease.taken = True
            lease.ends_at = now + self.lease_s + MARGIN_S
            return True
