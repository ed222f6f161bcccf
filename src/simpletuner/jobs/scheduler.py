"""Who starts now, on what, and why everybody else waits (api.md §4, queue). Pure: no clock, no database.

A plan takes about n log n for n jobs: whatever does not change from job to job is counted once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from heapq import heapify, heappop, heappush
from itertools import groupby
from typing import Literal

from simpletuner.jobs.device_room import DeviceRoom
from simpletuner.jobs.devices import Device
from simpletuner.jobs.worker_choice import WorkerChoice
from simpletuner.jobs.worker_slot import WorkerSlot

AGEING_STEP_S = 600.0
AGEING_MOST = 20
LOCAL, WORKER = "local", "worker"

ReasonCode = Literal[
    "gpus_busy",
    "gpu_memory",
    "gpu_limit",
    "job_limit",
    "user_limit",
    "output_dir_busy",
    "behind_head",
    "no_matching_worker",
    "workers_busy",
    "needs_approval",
    "preempted",
    "paused",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A job that waits. `order` is its place in time, unique."""

    job_id: str
    order: int
    queued_at: datetime
    priority: int = 10
    num_devices: int = 1
    preferred: tuple[int, ...] = ()
    any_gpu: bool = False
    output_dir: str = ""
    user_id: str = ""
    target: str = "auto"
    worker_labels: Mapping[str, str] = field(default_factory=dict[str, str])
    """Label → glob that a worker must match."""
    peak_bytes: int | None = None
    """What it will need of each device; None where nobody knows."""
    is_paused: bool = False
    """It waits for nobody and stands in nobody's way."""
    needs_approval: bool = False
    """As `is_paused`."""
    gave_way_to: str | None = None
    """The urgent job that had it yield."""

    @property
    def wanted(self) -> tuple[int, ...]:
        """The devices it insists on; empty when any will do. Fewer than it needs are no wish at all."""
        if self.any_gpu or len(self.preferred) < self.num_devices:
            return ()
        return self.preferred[: self.num_devices]


@dataclass(frozen=True, slots=True, kw_only=True)
class Occupant:
    """A job that holds devices: of this machine, or of the worker `worker_id`."""

    job_id: str
    devices: tuple[int, ...]
    output_dir: str = ""
    user_id: str = ""
    worker_id: str | None = None
    priority: int = 0
    started_order: int = 0
    """Larger for those that began later."""
    is_ending: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None is unlimited. `fair_share`: of equal priorities, first who has fewer jobs running."""

    max_jobs: int | None = 1
    max_devices: int | None = None
    max_jobs_per_user: int | None = None
    fair_share: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """`devices` are those of the worker `worker_id`, or of this machine."""

    job_id: str
    devices: tuple[int, ...]
    worker_id: str | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    job_id: str
    position: int
    reason: str
    reason_code: ReasonCode


def effective_priority(priority: int, queued_at: datetime, now: datetime) -> int:
    """One more for each ten minutes waited, at most twenty."""
    steps = int((now - queued_at).total_seconds() // AGEING_STEP_S)
    return priority + max(0, min(AGEING_MOST, steps))


def plan(
    queue: Sequence[Candidate],
    running: Sequence[Occupant],
    devices: Sequence[Device],
    limits: Limits,
    now: datetime,
    free_bytes: Mapping[int, int] | None = None,
    workers: Sequence[WorkerSlot] = (),
) -> list[Start | Wait]:
    """One answer for each of `queue`, in the order in which they are served.

    `free_bytes`: memory that is free on each device which no job of ours holds, where that is known.
    """
    board = _Board(running, devices, limits, free_bytes or {}, workers)
    board.known |= {job.job_id for job in queue}
    answers: list[Start | Wait] = []
    position = 0
    for job in _served(queue, board.running_of, now, fair_share=limits.fair_share):
        answer = board.place(job)
        if isinstance(answer, Start):
            answers.append(answer)
        else:
            position += 1
            code, reason = answer
            if job.gave_way_to in board.known and code in HELD_BY_OTHERS | {"behind_head"}:
                code, reason = "preempted", f"Gave way to job {job.gave_way_to}. {reason}"
            answers.append(Wait(job.job_id, position, reason, code))
    return answers


def _served(
    queue: Sequence[Candidate], running_of: Counter[str], now: datetime, *, fair_share: bool
) -> Iterator[Candidate]:
    """By priority, then by age or share; those that a person holds back come last.

    `running_of` may grow while this is read.
    """
    ranked = [
        (job.is_paused or job.needs_approval, -effective_priority(job.priority, job.queued_at, now), job.order, job)
        for job in queue
    ]
    # The third is unique: jobs are never compared.
    ranked.sort()
    if not fair_share:
        yield from (row[3] for row in ranked)
        return
    for _, tied in groupby(ranked, key=lambda row: row[:2]):
        yield from _shared_fairly([row[3] for row in tied], running_of)


def _shared_fairly(tied: Sequence[Candidate], running_of: Counter[str]) -> Iterator[Candidate]:
    lines: dict[str, list[Candidate]] = {}
    for job in reversed(tied):
        lines.setdefault(job.user_id, []).append(job)
    heap = [(running_of[user], line[-1].order, user) for user, line in lines.items()]
    heapify(heap)
    while heap:
        count, _, user = heappop(heap)
        if count == running_of[user]:
            yield lines[user].pop()
        if lines[user]:
            heappush(heap, (running_of[user], lines[user][-1].order, user))


_Refusal = tuple[ReasonCode, str]
HELD_BY_OTHERS = frozenset({"gpus_busy", "job_limit", "gpu_limit"})
"""Devices or a limit, which a running job gives back when it ends."""


class _Board:
    """The machine while a plan is made: what is used, and what the head has reserved."""

    def __init__(
        self,
        running: Sequence[Occupant],
        devices: Sequence[Device],
        limits: Limits,
        free_bytes: Mapping[int, int],
        workers: Sequence[WorkerSlot],
    ) -> None:
        local = [job for job in running if job.worker_id is None]
        self._workers = WorkerChoice(workers)
        self.known = {job.job_id for job in running}
        """Jobs that wait or run."""
        self._running = {job.job_id: job for job in local}
        self.running_of = Counter(job.user_id for job in running)
        self._indices = sorted(device.index for device in devices)
        self._existing = frozenset(self._indices)
        self._noun = "slot" if all(device.kind == "cpu" for device in devices) else "GPU"
        self._limits = limits
        self._holder = {index: job.job_id for job in local for index in job.devices}
        self._output_dirs = {job.output_dir: job.job_id for job in running if job.output_dir}
        self._free = [index for index in self._indices if index not in self._holder]
        self._memory = DeviceRoom(devices, frozenset(self._free), free_bytes)
        self._head: _Head | None = None

    def place(self, job: Candidate) -> Start | _Refusal:
        held = self._own_rule(job)
        if held is not None:
            return held
        if job.target != LOCAL:
            worker_id = self._workers.take(job)
            if worker_id is not None:
                self._count_in(job)
                return Start(job.job_id, tuple(range(job.num_devices)), worker_id)
            if job.target == WORKER or job.num_devices > len(self._indices):
                # It waits for a worker alone, and stands in nobody's way here.
                self._claim_folder(job)
                return self._workers.why(job)
        held = self._device_rule(job)
        if held is not None:
            return held
        refusal = self._backfill_refusal(job, self._head) if self._head else self._limit_refusal(job)
        if refusal is None:
            chosen = self._choose(job)
            if chosen is not None:
                self._take(job, chosen)
                return Start(job.job_id, chosen)
            refusal = ("gpus_busy", self._busy_reason(job))
        self._claim_folder(job)
        if self._head is None:
            self._become_head(job, refusal)
        return refusal

    def _own_rule(self, job: Candidate) -> _Refusal | None:
        """What holds this job alone: it is not the head, and nobody waits for it."""
        if job.needs_approval:
            return "needs_approval", "Waits for somebody's approval."
        if job.is_paused:
            return "paused", "Paused, until it is resumed."
        if job.output_dir in self._output_dirs:
            holder = self._output_dirs[job.output_dir]
            return "output_dir_busy", f"Output folder {job.output_dir} is used by job {holder}."
        most = self._limits.max_jobs_per_user
        if most is not None and self.running_of[job.user_id] >= most:
            return "user_limit", f"{self.running_of[job.user_id]} of at most {most} jobs of this user are running."
        return None

    def _device_rule(self, job: Candidate) -> _Refusal | None:
        """What no job of ours that ends will change."""
        if job.preferred and not self._existing.issuperset(job.wanted):
            missing = next(index for index in job.wanted if index not in self._existing)
            return "gpus_busy", f"Needs {self._noun} {missing}, which does not exist here."
        most_devices = self._limits.max_devices
        if most_devices is not None and job.num_devices > most_devices:
            return "gpu_limit", f"Needs {self._count(job.num_devices)}; at most {most_devices} may be in use."
        return None if job.peak_bytes is None else self._memory_refusal(job, job.peak_bytes)

    def _memory_refusal(self, job: Candidate, peak: int) -> _Refusal | None:
        """Of memory that no job of ours will give back."""
        needs = f"Needs {peak / 1e9:.1f} GB"
        for index in job.wanted:
            room = self._memory.room(index)
            if room is not None and room < peak:
                return "gpu_memory", f"{needs} on {self._noun} {index}; {room / 1e9:.1f} GB are free there."
        num_roomy = self._memory.num_with(peak)
        if not job.wanted and num_roomy < job.num_devices:
            most = self._memory.largest / 1e9
            told = f"{num_roomy} have so much free, the most is {most:.1f} GB"
            return "gpu_memory", f"{needs} on {self._count(job.num_devices)}; {told}."
        return None

    def _limit_refusal(self, job: Candidate) -> _Refusal | None:
        most_jobs, most_devices = self._limits.max_jobs, self._limits.max_devices
        if most_jobs is not None and len(self._running) + 1 > most_jobs:
            return "job_limit", f"{len(self._running)} of at most {most_jobs} local jobs are running."
        used = len(self._holder)
        if most_devices is not None and used + job.num_devices > most_devices:
            return "gpu_limit", f"Needs {self._count(job.num_devices)}; {used} of at most {most_devices} are in use."
        return None

    def _backfill_refusal(self, job: Candidate, head: _Head) -> _Refusal | None:
        """A later job may run only where it cannot delay the head."""
        if head.waits_for_limit or not self._free:
            return head.behind
        if self._limit_refusal(job) is not None or self._choose(job) is None:
            return head.behind
        # When the head's devices come free, those who hold them now are gone.
        limits = self._limits
        jobs_then = len(self._running) + 1 - head.num_leaving + 1
        devices_then = len(self._holder) + job.num_devices - head.num_freed + head.job.num_devices
        if limits.max_jobs is not None and jobs_then > limits.max_jobs:
            return head.behind
        if limits.max_devices is not None and devices_then > limits.max_devices:
            return head.behind
        if limits.max_jobs_per_user is not None and job.user_id == head.job.user_id:
            theirs_then = self.running_of[job.user_id] + 1 - head.num_leaving_of_user + 1
            if theirs_then > limits.max_jobs_per_user:
                return head.behind
        return None

    def _choose(self, job: Candidate) -> tuple[int, ...] | None:
        if len(self._free) < job.num_devices:
            return None
        if job.wanted:
            return job.wanted if all(map(self._is_free, job.wanted)) else None
        fitting = self._memory.fitting(self._free, job.peak_bytes)
        return tuple(fitting[: job.num_devices]) if len(fitting) >= job.num_devices else None

    def _is_free(self, index: int) -> bool:
        at = bisect_left(self._free, index)
        return at < len(self._free) and self._free[at] == index

    def _take(self, job: Candidate, chosen: tuple[int, ...]) -> None:
        self._running[job.job_id] = Occupant(
            job_id=job.job_id, devices=chosen, output_dir=job.output_dir, user_id=job.user_id
        )
        self._count_in(job)
        self._holder |= dict.fromkeys(chosen, job.job_id)
        for index in chosen:
            del self._free[bisect_left(self._free, index)]

    def _count_in(self, job: Candidate) -> None:
        """It runs, wherever."""
        self.running_of[job.user_id] += 1
        self._claim_folder(job)

    def _claim_folder(self, job: Candidate) -> None:
        """A later job must not take it from under one that waits for devices."""
        if job.output_dir:
            self._output_dirs[job.output_dir] = job.job_id

    def _become_head(self, job: Candidate, refusal: _Refusal) -> None:
        fitting = self._memory.fitting(self._free, job.peak_bytes)
        held = self._memory.fitting([index for index in self._indices if index in self._holder], job.peak_bytes)
        reserved = frozenset(job.wanted or [*fitting, *held][: job.num_devices])
        leaving = {self._holder[index] for index in reserved if index in self._holder}
        self._head = _Head(
            job=job,
            waits_for_limit=refusal[0] in {"job_limit", "gpu_limit"},
            behind=("behind_head", f"Waits behind job {job.job_id}, which is next."),
            num_leaving=len(leaving),
            num_freed=sum(len(self._running[name].devices) for name in leaving),
            num_leaving_of_user=sum(self._running[name].user_id == job.user_id for name in leaving),
        )
        self._free = [index for index in self._free if index not in reserved]

    def _count(self, number: int) -> str:
        return f"{number} {self._noun}(s)"

    def _busy_reason(self, job: Candidate) -> str:
        if not job.wanted:
            free = len(self._memory.fitting(self._free, job.peak_bytes))
            return f"Needs {self._count(job.num_devices)}; {free} of {len(self._indices)} are free."
        names = ",".join(str(index) for index in job.wanted)
        busy = [
            f"{self._noun} {index} is used by job {self._holder[index]}"
            for index in job.wanted
            if index in self._holder
        ]
        return f"Needs {self._noun} {names}; {'; '.join(busy)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The first that waits for what others hold: `num_leaving` jobs hold what it reserved and give `num_freed` back."""

    job: Candidate
    waits_for_limit: bool
    behind: _Refusal
    num_leaving: int
    num_freed: int
    num_leaving_of_user: int
