"""Which worker a job gets (api.md §5, choice). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from simpletuner.jobs.worker_slot import WorkerSlot

WorkerReason = Literal["no_matching_worker", "workers_busy"]
SHOWN = 3


class Need(Protocol):
    @property
    def num_devices(self) -> int: ...

    @property
    def peak_bytes(self) -> int | None: ...

    @property
    def worker_labels(self) -> Mapping[str, str]: ...


class WorkerChoice:
    """While a plan is made: each worker is given at most once; of those that fit, the one that is idle longest."""

    def __init__(self, workers: Sequence[WorkerSlot]) -> None:
        self._known = [worker for worker in workers if worker.status != "offline"]
        self._idle = {
            worker.worker_id
            for worker in sorted(self._known, key=lambda worker: worker.idle_since)
            if worker.status == "idle"
        }
        self._known.sort(key=lambda worker: worker.idle_since)
        self._fitting: dict[object, list[WorkerSlot]] = {}

    def take(self, need: Need) -> str | None:
        """Its id; it is taken then."""
        if not self._idle:
            return None
        chosen = next((worker.worker_id for worker in self._fit(need) if worker.worker_id in self._idle), None)
        self._idle.discard(chosen or "")
        return chosen

    def why(self, need: Need) -> tuple[WorkerReason, str]:
        """Why none was there to take."""
        wish = _wish(need)
        fitting = self._fit(need)
        if fitting:
            shown = ", ".join(f"{worker.name} is {self._state(worker)}" for worker in fitting[:SHOWN])
            more = f", and {len(fitting) - SHOWN} more like them" if len(fitting) > SHOWN else ""
            return "workers_busy", f"Needs {wish}: {shown}{more}."
        if not self._known:
            return "no_matching_worker", f"Needs {wish}; none is connected."
        return "no_matching_worker", f"Needs {wish}; none of {len(self._known)} connected is one{self._lack(need)}."

    def _state(self, worker: WorkerSlot) -> str:
        return "taken by a job before it" if worker.status == "idle" else worker.status

    def _fit(self, need: Need) -> list[WorkerSlot]:
        key = (need.num_devices, need.peak_bytes, tuple(sorted(need.worker_labels.items())))
        if key not in self._fitting:
            self._fitting[key] = [worker for worker in self._known if fits(worker, need)]
        return self._fitting[key]

    def _lack(self, need: Need) -> str:
        """The first label that nobody has, where it is that."""
        for label, glob in need.worker_labels.items():
            if not any(_matches(worker, label, glob) for worker in self._known):
                return f": {label}={glob} matches nobody"
        most = max((worker.num_devices for worker in self._known), default=0)
        return f": the largest has {most} device(s)" if most < need.num_devices else ""


def fits(worker: WorkerSlot, need: Need) -> bool:
    """Devices, memory where both are known, and every wanted label (case-sensitive globs)."""
    if worker.num_devices < need.num_devices:
        return False
    if need.peak_bytes is not None and worker.memory_bytes is not None and worker.memory_bytes < need.peak_bytes:
        return False
    return all(_matches(worker, label, glob) for label, glob in need.worker_labels.items())


def _matches(worker: WorkerSlot, label: str, glob: str) -> bool:
    return label in worker.labels and fnmatchcase(worker.labels[label], glob)


def _wish(need: Need) -> str:
    parts = [f"{label}={glob}" for label, glob in need.worker_labels.items()]
    if need.num_devices > 1:
        parts.append(f"{need.num_devices} devices")
    return f"a worker with {', '.join(parts)}" if parts else "a worker"
