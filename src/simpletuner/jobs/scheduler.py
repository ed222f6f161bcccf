"""Who starts now, on what, and why everybody else waits (api.md §4, queue). Pure: no clock, no database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from simpletuner.jobs.devices import Device

AGEING_STEP_S = 600.0
AGEING_MOST = 20

ReasonCode = Literal["gpus_busy", "gpu_limit", "job_limit", "output_dir_busy", "behind_head", "paused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A queued job. `order` is its place in time, unique."""

    job_id: str
    order: int
    queued_at: datetime
    priority: int = 10
    num_devices: int = 1
    preferred: tuple[int, ...] = ()
    any_gpu: bool = False
    output_dir: str = ""
    is_paused: bool = False
    """It waits for nobody and stands in nobody's way."""

    @property
    def wanted(self) -> tuple[int, ...]:
        """The devices it insists on; empty when any will do. Fewer than it needs are no wish at all."""
        if self.any_gpu or len(self.preferred) < self.num_devices:
            return ()
        return self.preferred[: self.num_devices]


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """A job that holds devices."""

    job_id: str
    devices: tuple[int, ...]
    output_dir: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None is unlimited."""

    max_jobs: int | None = 1
    max_devices: int | None = None


@dataclass(frozen=True, slots=True)
class Start:
    job_id: str
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    job_id: str
    position: int
    reason: str
    reason_code: ReasonCode


def effective_priority(candidate: Candidate, now: datetime) -> int:
    """One more for each ten minutes waited, at most twenty."""
    waited_s = max(0.0, (now - candidate.queued_at).total_seconds())
    return candidate.priority + min(AGEING_MOST, int(waited_s // AGEING_STEP_S))


def plan(
    queue: Sequence[Candidate], running: Sequence[Occupant], devices: Sequence[Device], limits: Limits, now: datetime
) -> list[Start | Wait]:
    """One answer for each of `queue`, in the order in which they are served."""
    board = _Board(running, devices, limits)
    ordered = sorted(queue, key=lambda job: (-effective_priority(job, now), job.order))
    answers: list[Start | Wait] = []
    position = 0
    for job in ordered:
        answer = board.place(job)
        if isinstance(answer, Start):
            answers.append(answer)
        else:
            position += 1
            code, reason = answer
            answers.append(Wait(job.job_id, position, reason, code))
    return answers


_Refusal = tuple[ReasonCode, str]


class _Board:
    """The machine while a plan is made: what is used, and what the head has reserved."""

    def __init__(self, running: Sequence[Occupant], devices: Sequence[Device], limits: Limits) -> None:
        self._running = list(running)
        self._indices = sorted(device.index for device in devices)
        self._noun = "slot" if all(device.kind == "cpu" for device in devices) else "GPU"
        self._limits = limits
        self._holder = {index: job.job_id for job in running for index in job.devices}
        self._output_dirs = {job.output_dir: job.job_id for job in running if job.output_dir}
        self._head: Candidate | None = None
        self._head_waits_for_limit = False
        self._reserved: frozenset[int] = frozenset()

    def place(self, job: Candidate) -> Start | _Refusal:
        if job.is_paused:
            return "paused", "Paused, until it is resumed."
        holder = self._output_dirs.get(job.output_dir)
        if holder is not None:
            return "output_dir_busy", f"Output folder {job.output_dir} is used by job {holder}."
        refusal = self._backfill_refusal(job) if self._head else self._limit_refusal(job)
        if refusal is None:
            chosen = self._choose(job)
            if chosen is not None:
                self._take(job, chosen)
                return Start(job.job_id, chosen)
            refusal = ("gpus_busy", self._busy_reason(job))
        # A later job must not take the folder from under one that waits for devices.
        if job.output_dir:
            self._output_dirs[job.output_dir] = job.job_id
        if self._head is None:
            self._become_head(job, refusal)
        return refusal

    def _limit_refusal(self, job: Candidate) -> _Refusal | None:
        most_jobs, most_devices = self._limits.max_jobs, self._limits.max_devices
        if most_jobs is not None and len(self._running) + 1 > most_jobs:
            return "job_limit", f"{len(self._running)} of at most {most_jobs} local jobs are running."
        used = len(self._holder)
        if most_devices is not None and used + job.num_devices > most_devices:
            return (
                "gpu_limit",
                f"Needs {job.num_devices} {self._noun}(s); {used} of at most {most_devices} are in use.",
            )
        return None

    def _backfill_refusal(self, job: Candidate) -> _Refusal | None:
        """A later job may run only where it cannot delay the head."""
        head = self._head
        if head is None:
            return None
        behind: _Refusal = ("behind_head", f"Waits behind job {head.job_id}, which is next.")
        if self._head_waits_for_limit or self._limit_refusal(job) is not None:
            return behind
        chosen = self._choose(job)
        if chosen is None or self._reserved.intersection(chosen):
            return behind
        # When the head's devices come free, those who hold them now are gone.
        leaving = {self._holder[index] for index in self._reserved if index in self._holder}
        freed = sum(1 for holder in self._holder.values() if holder in leaving)
        jobs_then = len(self._running) + 1 - len(leaving) + 1
        devices_then = len(self._holder) + job.num_devices - freed + head.num_devices
        if self._limits.max_jobs is not None and jobs_then > self._limits.max_jobs:
            return behind
        if self._limits.max_devices is not None and devices_then > self._limits.max_devices:
            return behind
        return None

    def _free(self) -> list[int]:
        return [index for index in self._indices if index not in self._holder and index not in self._reserved]

    def _choose(self, job: Candidate) -> tuple[int, ...] | None:
        free = self._free()
        if job.wanted:
            return job.wanted if set(job.wanted) <= set(free) else None
        return tuple(free[: job.num_devices]) if len(free) >= job.num_devices else None

    def _take(self, job: Candidate, chosen: tuple[int, ...]) -> None:
        occupant = Occupant(job_id=job.job_id, devices=chosen, output_dir=job.output_dir)
        self._running.append(occupant)
        self._holder |= dict.fromkeys(chosen, job.job_id)
        if job.output_dir:
            self._output_dirs[job.output_dir] = job.job_id

    def _become_head(self, job: Candidate, refusal: _Refusal) -> None:
        self._head = job
        self._head_waits_for_limit = refusal[0] in {"job_limit", "gpu_limit"}
        if job.wanted:
            self._reserved = frozenset(job.wanted)
        else:
            free_first = self._free() + [index for index in self._indices if index in self._holder]
            self._reserved = frozenset(free_first[: job.num_devices])

    def _busy_reason(self, job: Candidate) -> str:
        if not job.wanted:
            free = len(self._free())
            return f"Needs {job.num_devices} {self._noun}(s); {free} of {len(self._indices)} are free."
        names = ",".join(str(index) for index in job.wanted)
        busy = [
            f"{self._noun} {index} is used by job {self._holder[index]}"
            for index in job.wanted
            if index in self._holder
        ]
        missing = [f"{self._noun} {index} does not exist" for index in job.wanted if index not in self._indices]
        return f"Needs {self._noun} {names}; {'; '.join(busy + missing)}"
