"""Which running jobs give way to urgent ones that wait (api.md §4; docs/adr/0030). Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from simpletuner.jobs.scheduler import HELD_BY_OTHERS, Candidate, Occupant, Start, Wait

URGENT = 30
"""Base priority from which a job may have others yield, and below which a running one may be asked to."""
MOST_TRIED = 64
"""On a machine with hundreds of jobs not every one of them is tried alone."""

PlanAlone = Callable[[Candidate, Sequence[Occupant]], Start | Wait]
"""What the planner answers to a job with nobody else in the queue, beside those that run."""


@dataclass(frozen=True, slots=True)
class Preempt:
    """`job_id` is to save, give its devices back and wait."""

    job_id: str
    for_job: str


def plan_preemptions(
    answers: Sequence[Start | Wait],
    queue: Mapping[str, Candidate],
    running: Sequence[Occupant],
    plan_alone: PlanAlone,
) -> list[Preempt]:
    """For each urgent job that waits for what others hold, in the order in which they are served: the fewest that help.

    Those that are ending already count as gone: nobody is asked twice for the same devices.
    """
    left = [*running, *_started(answers, queue)]
    asked: list[Preempt] = []
    for answer in answers:
        job = queue[answer.job_id]
        if not isinstance(answer, Wait) or job.priority < URGENT or answer.reason_code not in HELD_BY_OTHERS:
            continue
        staying = [occupant for occupant in left if not occupant.is_ending]
        victims = _choose(job, staying, plan_alone)
        if victims is None:
            continue
        asked += [Preempt(victim.job_id, job.job_id) for victim in victims]
        left = _without(staying, victims)
        start = plan_alone(job, left)
        if isinstance(start, Start):
            left.append(_occupant(job, start))
    return asked


def _choose(job: Candidate, running: Sequence[Occupant], plan_alone: PlanAlone) -> list[Occupant] | None:
    """None where no set of them helps. The least urgent go first, of equals those that began last."""

    def helps(victims: Sequence[Occupant]) -> bool:
        return isinstance(plan_alone(job, _without(running, victims)), Start)

    if helps(()):
        return []
    able = [each for each in running if each.worker_id is None and each.priority < min(URGENT, job.priority)]
    able.sort(key=lambda each: (each.priority, -each.started_order))
    if not helps(able):
        return None
    alone = next((victim for victim in able[:MOST_TRIED] if helps([victim])), None)
    if alone is not None:
        return [alone]
    # More of them help no less.
    chosen = able[: bisect_left(range(len(able)), True, key=lambda count: helps(able[:count]))]
    for victim in chosen[:MOST_TRIED]:
        fewer = [other for other in chosen if other is not victim]
        if helps(fewer):
            chosen = fewer
    return chosen


def _without(running: Sequence[Occupant], gone: Sequence[Occupant]) -> list[Occupant]:
    names = {occupant.job_id for occupant in gone}
    return [occupant for occupant in running if occupant.job_id not in names]


def _started(answers: Sequence[Start | Wait], queue: Mapping[str, Candidate]) -> list[Occupant]:
    return [_occupant(queue[answer.job_id], answer) for answer in answers if isinstance(answer, Start)]


def _occupant(job: Candidate, start: Start) -> Occupant:
    return Occupant(
        job_id=job.job_id,
        devices=start.devices,
        output_dir=job.output_dir,
        user_id=job.user_id,
        worker_id=start.worker_id,
        priority=max(URGENT, job.priority),  # it has only just begun
    )
