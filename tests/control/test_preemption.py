"""Urgent jobs have others yield: as few as help, none for nothing, and those go on where they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from control_world import World
from hypothesis import given
from hypothesis import strategies as st
from test_scheduler import NOW, devices, job, situations

from simpletuner.job import JobStatus
from simpletuner.jobs.devices import Device
from simpletuner.jobs.preemption import URGENT, plan_preemptions
from simpletuner.jobs.scheduler import HELD_BY_OTHERS, Candidate, Limits, Occupant, Start, Wait, plan
from simpletuner.store.settings import JOB_MAX_CONCURRENT

Situation = tuple[list[Candidate], list[Occupant], list[Device], Limits]


@given(
    situations(), st.lists(st.sampled_from([0, 10, 20, 30, 40]), min_size=12, max_size=12), st.sets(st.integers(0, 5))
)
def test_those_who_yield_help_and_are_less_urgent(
    situation: Situation, priorities: list[int], ending: set[int]
) -> None:
    queue, running, machine, limits = situation
    queue = [replace(each, priority=priorities[number]) for number, each in enumerate(queue)]
    running = [
        replace(each, priority=priorities[-number - 1], started_order=number, is_ending=number in ending)
        for number, each in enumerate(running)
    ]

    def alone(asking: Candidate, beside: list[Occupant]) -> Start | Wait:
        return plan([asking], beside, machine, limits, NOW)[0]

    answers = plan(queue, running, machine, limits, NOW)
    by_id = {each.job_id: each for each in queue}
    asked = plan_preemptions(answers, by_id, running, alone)  # pyright: ignore[reportArgumentType]
    victims = [each.job_id for each in asked]
    assert len(victims) == len(set(victims))
    running_by_id = {each.job_id: each for each in running}
    for each in asked:
        victim, asker = running_by_id[each.job_id], by_id[each.for_job]
        assert victim.priority < URGENT <= asker.priority and not victim.is_ending
    first = next(
        (
            answer
            for answer in answers
            if isinstance(answer, Wait)
            and by_id[answer.job_id].priority >= URGENT
            and answer.reason_code in HELD_BY_OTHERS
        ),
        None,
    )
    if first is None:
        assert asked == []
        return
    # Of the first that asks: without its victims and those that end, beside those that just started, it runs.
    begun: list[Occupant] = []
    for answer in answers:
        if isinstance(answer, Start):
            began = by_id[answer.job_id]
            occupant = Occupant(job_id=began.job_id, devices=answer.devices, output_dir=began.output_dir)
            begun.append(replace(occupant, user_id=began.user_id))
    mine = {each.job_id for each in asked if each.for_job == first.job_id}
    staying = [each for each in [*running, *begun] if not each.is_ending and each.job_id not in mine]
    starts = isinstance(alone(by_id[first.job_id], staying), Start)
    assert starts or not mine
    for spared in mine:
        assert not isinstance(alone(by_id[first.job_id], [*staying, running_by_id[spared]]), Start)


def test_the_fewest_then_the_least_urgent_then_the_latest() -> None:
    running = [
        Occupant(job_id="two", devices=(0, 1), priority=20, started_order=0),
        Occupant(job_id="low", devices=(2,), priority=0, started_order=1),
        Occupant(job_id="old", devices=(3,), priority=10, started_order=2),
        Occupant(job_id="new", devices=(4,), priority=10, started_order=3),
    ]

    def asked(**wish: object) -> list[str]:
        urgent = job("urgent", priority=30, **wish)
        answers = plan([urgent], running, devices(5), Limits(max_jobs=None), NOW)

        def alone(asking: Candidate, beside: list[Occupant]) -> Start | Wait:
            return plan([asking], beside, devices(5), Limits(max_jobs=None), NOW)[0]

        return [each.job_id for each in plan_preemptions(answers, {"urgent": urgent}, running, alone)]  # pyright: ignore[reportArgumentType]

    assert asked() == ["low"]
    assert asked(num_devices=2) == ["two"]
    assert asked(num_devices=3) == ["low", "new", "old"]
    assert asked(preferred=(3,)) == ["old"]
    assert asked(num_devices=1, peak_bytes=10**15) == [], "memory that nobody will give back"
    running[1] = replace(running[1], is_ending=True)
    assert asked() == [], "one is on its way out already"


def test_an_urgent_job_gets_the_device_and_the_other_goes_on(world: World) -> None:
    low = world.submit(saves=1000, step_s=0.01).job.job_id
    world.tick_until(low, JobStatus.RUNNING)
    urgent = world.submit(priority=URGENT, steps=5)
    assert urgent.wait is not None and urgent.wait.reason_code in {"job_limit", "gpus_busy"}
    assert f"Job {low} gives way to it." in urgent.wait.reason
    world.tick_until(low, JobStatus.QUEUED)
    waiting = world.placement.waits()[low]
    assert waiting.reason_code == "preempted" and waiting.reason.startswith(f"Gave way to job {urgent.job.job_id}.")
    world.tick_until(urgent.job.job_id, JobStatus.COMPLETED)
    job_now = world.tick_until(low, JobStatus.RUNNING)
    assert (job_now.attempt, job_now.gave_way_to) == (1, None)
    said = [event.as_dict() for event in world.store.events.of_type(low, "training.status")]
    assert [event["data"]["status"] for event in said][-1] == "resumed"
    stopped_at = next(event for event in said if event["data"]["status"] == "stopped")["data"]["global_step"]
    assert said[-1]["data"]["global_step"] == stopped_at > 0


@pytest.mark.parametrize(("preempts", "priority"), [(False, 40), (True, 29)])
def test_nobody_yields_where_it_is_off_or_not_urgent(tmp_path: Path, preempts: bool, priority: int) -> None:
    world = World(tmp_path, preempts=preempts)
    world.store.settings.set(JOB_MAX_CONCURRENT, None)
    low = world.submit().job.job_id
    world.tick_until(low, JobStatus.RUNNING)
    other = world.submit(priority=priority).job.job_id
    for _ in range(3):
        world.supervisor.tick()
    assert (world.job(low).status, world.job(other).status) == (JobStatus.RUNNING, JobStatus.QUEUED)
    world.close()
