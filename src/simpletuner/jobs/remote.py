"""Jobs on workers that dial in: an assignment waits in the store until the worker fetches it."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.job import Command, JobDir
from simpletuner.jobs.bell import Bell
from simpletuner.jobs.devices import Device
from simpletuner.jobs.fleet import Fleet
from simpletuner.jobs.leases import ACK_S, Leases
from simpletuner.jobs.storage import forget_incoming
from simpletuner.store.store import Store


class RemoteExecutor:
    """An `Executor` whose runners dial out. Their job's directory here is filled by what they send."""

    def __init__(self, store: Store, leases: Leases, fleet: Fleet) -> None:
        self._store = store
        self._leases = leases
        self._fleet = fleet
        self._refusals: dict[str, str] = {}
        self._num_told: dict[str, int] = {}
        self.bell = Bell()
        """Rung, under its id, for a job that has a new command."""

    def start(self, job: JobDir, devices: Sequence[Device]) -> None:
        """The row of the assignment is there: its transaction leased the devices."""
        assignment = self._store.assignments.get(job.root.name)
        if assignment is None:
            raise LookupError(f"job {job.root.name} was started on a worker without an assignment")
        self._num_told.pop(job.root.name, None)
        self._leases.offer(assignment)
        self._fleet.wake(assignment.worker_id)

    def is_alive(self, job: JobDir) -> bool:
        return self._leases.is_alive(job.root.name)

    def refuse(self, job_id: str, reason: str) -> None:
        """By the worker, before it took the lease."""
        self._refusals[job_id] = reason
        self._leases.drop(job_id)

    def refusal(self, job: JobDir) -> str | None:
        if self._leases.is_held(job.root.name):
            return None
        told = self._refusals.get(job.root.name)
        return f"Its worker refused it: {told}" if told else f"Its worker did not take it within {ACK_S:.0f} s."

    def lost_after_s(self, job: JobDir) -> float:
        """A lease that is over is over."""
        return 0.0

    def send(self, job: JobDir, command: Command) -> None:
        job.send(command)
        self.bell.ring(job.root.name)

    def num_told(self, job_id: str) -> int:
        """Commands of this assignment that its runner was sent."""
        return self._num_told.get(job_id, 0)

    def note_told(self, job_id: str, number: int) -> None:
        self._num_told[job_id] = number

    def forget(self, job: JobDir, *, lost: bool) -> None:
        begun = self._leases.is_held(job.root.name)
        self._refusals.pop(job.root.name, None)
        self._num_told.pop(job.root.name, None)
        forget_incoming(job)
        worker_id = self._leases.forget(job.root.name)
        self.bell.ring(job.root.name)
        if worker_id is None:
            return
        if lost and begun:
            self._fleet.quarantine(worker_id)
        elif begun:
            self._fleet.freed(worker_id)
        else:
            self._fleet.rest(worker_id)
        self._fleet.wake(worker_id)

    def reap(self) -> None:
        """Its children are others'."""
