"""A discrete-event simulation of the planner: what a decision costs of CPU, and what backfill gains over plain FIFO.

python -m scripts.simulate_queue --jobs 10000 --devices 1000 --workers 200 --decisions 300
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from simpletuner.jobs.devices import Device
from simpletuner.jobs.scheduler import Candidate, Limits, Occupant, Start, plan
from simpletuner.jobs.worker_slot import WorkerSlot

T = TypeVar("T")
START = datetime(2026, 1, 1, tzinfo=UTC)
COUNTS = ((1, 50), (2, 20), (4, 15), (8, 12), (16, 2), (64, 1))
"""Devices of a job, and how often in a hundred: most are small."""
PRIORITIES = ((10, 70), (20, 20), (30, 5), (0, 5))
TARGETS = (("auto", 50), ("local", 30), ("worker", 20))
"""Where there are workers."""
KINDS = ("a100-40", "a100-80", "h100")
USERS = 60
MEDIAN_S, SPREAD = 1800.0, 1.4
"""Of the lognormal durations."""


@dataclass
class Simulation:
    """Keeps `depth` jobs waiting; an event is the end of a job."""

    devices: int
    depth: int
    backfill: bool
    limits: Limits
    draw: random.Random
    workers: int = 0
    """Of eight devices each."""
    queue: dict[str, Candidate] = field(default_factory=dict[str, Candidate])
    running: dict[str, Occupant] = field(default_factory=dict[str, Occupant])
    ends: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    now_s: float = 0.0
    made: int = 0
    busy_s: float = 0.0
    waits_s: list[float] = field(default_factory=list[float])
    decision_s: list[float] = field(default_factory=list[float])
    durations: dict[str, float] = field(default_factory=dict[str, float])

    def run(self, decisions: int) -> None:
        machine = [Device(index, "gpu", 80, "cuda") for index in range(self.devices)]
        for _ in range(decisions):
            while len(self.queue) < self.depth:
                self._arrive()
            self._decide(machine)
            if self.ends:
                self._end()

    def _arrive(self) -> None:
        self.made += 1
        name = f"job{self.made}"
        count = min(self.devices, _pick(self.draw, COUNTS))
        preferred: tuple[int, ...] = ()
        if count <= 8 and self.draw.random() < 0.2:
            first = self.draw.randrange(0, max(1, self.devices - count))
            preferred = tuple(range(first, first + count))
        self.queue[name] = Candidate(
            job_id=name,
            order=self.made,
            queued_at=START + timedelta(seconds=self.now_s - self.draw.random() * 60),
            priority=_pick(self.draw, PRIORITIES),
            num_devices=count,
            preferred=preferred,
            user_id=f"user{int(self.draw.paretovariate(1)) % USERS}",
            target=_pick(self.draw, TARGETS) if self.workers else "auto",
            worker_labels={"gpu": "a100*"} if self.workers and self.draw.random() < 0.3 else {},
            output_dir=f"/output/{name}",
        )
        self.durations[name] = self.draw.lognormvariate(0, SPREAD) * MEDIAN_S

    def _decide(self, machine: list[Device]) -> None:
        now = START + timedelta(seconds=self.now_s)
        queue, running = list(self.queue.values()), list(self.running.values())
        fleet = self._fleet()
        began = time.process_time()
        answers = plan(queue, running, machine, self.limits, now, None, fleet)
        self.decision_s.append(time.process_time() - began)
        for answer in answers:
            if isinstance(answer, Start):
                self._start(answer, now)
            elif not self.backfill:
                return

    def _fleet(self) -> list[WorkerSlot]:
        busy = {job.worker_id for job in self.running.values()}
        return [
            WorkerSlot(
                worker_id=f"w{number}",
                name=f"box-{number}",
                num_devices=8,
                status="busy" if f"w{number}" in busy else "idle",
                labels={"gpu": KINDS[number % len(KINDS)]},
                idle_since=float(number),
            )
            for number in range(self.workers)
        ]

    def _start(self, answer: Start, now: datetime) -> None:
        job = self.queue.pop(answer.job_id)
        self.running[job.job_id] = Occupant(
            job_id=job.job_id,
            devices=answer.devices,
            output_dir=job.output_dir,
            user_id=job.user_id,
            worker_id=answer.worker_id,
        )
        self.waits_s.append((now - job.queued_at).total_seconds())
        heapq.heappush(self.ends, (self.now_s + self.durations[job.job_id], job.job_id))

    def _end(self) -> None:
        at, name = heapq.heappop(self.ends)
        held = Counter((job.worker_id, index) for job in self.running.values() for index in job.devices)
        assert not held or max(held.values()) == 1
        used = sum(machine is None for machine, _ in held)
        self.busy_s += used * (at - self.now_s)
        self.now_s = at
        del self.running[name]

    @property
    def utilisation(self) -> float:
        return self.busy_s / (self.devices * self.now_s) if self.now_s else 0.0


def _pick(draw: random.Random, weighted: tuple[tuple[T, int], ...]) -> T:
    return draw.choices([value for value, _ in weighted], [weight for _, weight in weighted])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000, help="waiting at every decision")
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--decisions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    for name, fair, backfill in (("plan", False, True), ("plan, fair share", True, True), ("FIFO", False, False)):
        limits = Limits(max_jobs=None, max_jobs_per_user=None, fair_share=fair)
        run = Simulation(asked.devices, asked.jobs, backfill, limits, random.Random(asked.seed), asked.workers)
        run.run(asked.decisions)
        milliseconds = sorted(1000 * each for each in run.decision_s)
        print(
            f"{name}: a decision takes of CPU p50 {statistics.median(milliseconds):.1f} ms, "
            f"p99 {milliseconds[int(0.99 * (len(milliseconds) - 1))]:.1f} ms, longest {milliseconds[-1]:.1f} ms; "
            f"devices in use {100 * run.utilisation:.1f} %; {len(run.waits_s)} started, longest wait "
            f"{max(run.waits_s) / 3600:.2f} h"
        )


if __name__ == "__main__":
    main()
