"""Laws of the plan, and what its answers say."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from simpletuner.jobs.devices import Device
from simpletuner.jobs.scheduler import Candidate, Limits, Occupant, Start, Wait, effective_priority, plan

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def devices(count: int) -> list[Device]:
    return [Device(index, "gpu", 24, "cuda") for index in range(count)]


def job(name: str, order: int = 1, **more: object) -> Candidate:
    return replace(Candidate(job_id=name, order=order, queued_at=NOW), **more)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Candidate], list[Occupant], list[Device], Limits]:
    count = draw(st.integers(1, 5))
    numbers = st.integers(0, count - 1)
    queue = [
        Candidate(
            job_id=f"q{order}",
            order=order,
            queued_at=NOW,
            priority=draw(st.sampled_from([0, 10, 20])),
            num_devices=draw(st.integers(1, count)),
            preferred=tuple(draw(st.lists(numbers, unique=True, max_size=count))),
            any_gpu=draw(st.booleans()),
            output_dir=draw(st.sampled_from(["/a", "/b", f"/own{order}", f"/own{order}"])),
        )
        for order in range(draw(st.integers(0, 6)))
    ]
    free = list(range(count))
    running: list[Occupant] = []
    while free and draw(st.booleans()):
        held = tuple(free.pop() for _ in range(draw(st.integers(1, len(free)))))
        running.append(Occupant(job_id=f"r{len(running)}", devices=held, output_dir=f"/r{len(running)}"))
    most = st.none() | st.integers(1, 4)
    return queue, running, devices(count), Limits(max_jobs=draw(most), max_devices=draw(most))


@given(situations())
def test_nothing_is_promised_twice(situation: tuple[list[Candidate], list[Occupant], list[Device], Limits]) -> None:
    queue, running, machine, limits = situation
    answers = plan(queue, running, machine, limits, NOW)
    assert sorted(answer.job_id for answer in answers) == sorted(candidate.job_id for candidate in queue)
    by_id = {candidate.job_id: candidate for candidate in queue}
    starts = [answer for answer in answers if isinstance(answer, Start)]
    held = [index for occupant in running for index in occupant.devices]
    held += [index for start in starts for index in start.devices]
    assert len(held) == len(set(held))
    assert set(held) <= {device.index for device in machine}
    assert all(len(start.devices) == by_id[start.job_id].num_devices for start in starts)
    if starts:
        assert limits.max_jobs is None or len(running) + len(starts) <= limits.max_jobs
        assert limits.max_devices is None or len(held) <= limits.max_devices
    folders = [by_id[start.job_id].output_dir for start in starts] + [occupant.output_dir for occupant in running]
    assert len(folders) == len(set(folders))
    waits = [answer for answer in answers if isinstance(answer, Wait)]
    assert [wait.position for wait in waits] == list(range(1, len(waits) + 1))
    assert all(wait.reason for wait in waits)


@given(st.lists(st.sampled_from([0, 10, 20]), max_size=6), st.integers(1, 3))
def test_equal_needs_are_served_by_priority_then_age(priorities: list[int], count: int) -> None:
    queue = [job(f"q{order}", order, priority=priority) for order, priority in enumerate(priorities)]
    answers = plan(queue, [], devices(count), Limits(max_jobs=None), NOW)
    wanted = [candidate.job_id for candidate in sorted(queue, key=lambda each: (-each.priority, each.order))]
    assert [answer.job_id for answer in answers] == wanted
    assert [isinstance(answer, Start) for answer in answers] == [number < count for number in range(len(queue))]


@dataclass(order=True)
class _End:
    at: int
    job_id: str


def _start_time(
    head: Candidate, others: list[Candidate], running: list[Occupant], machine: list[Device], limits: Limits
) -> int:
    """When `head` starts if every job lasts as long as its name says; others come after it."""
    queue, now = [head, *others], 0
    active = {occupant.job_id: occupant for occupant in running}
    ends = [_End(_lasts(name), name) for name in active]
    heapq.heapify(ends)
    while True:
        for answer in plan(queue, list(active.values()), machine, limits, NOW):
            if not isinstance(answer, Start):
                continue
            if answer.job_id == head.job_id:
                return now
            started = next(candidate for candidate in queue if candidate.job_id == answer.job_id)
            queue.remove(started)
            active[started.job_id] = Occupant(
                job_id=started.job_id, devices=answer.devices, output_dir=started.output_dir
            )
            heapq.heappush(ends, _End(now + _lasts(started.job_id), started.job_id))
        if not ends:
            return -1
        now = ends[0].at
        while ends and ends[0].at == now:
            del active[heapq.heappop(ends).job_id]


def _lasts(name: str) -> int:
    return 1 + sum(name.encode()) * 7 % 11


@given(situations())
def test_the_head_is_never_delayed_by_who_comes_later(
    situation: tuple[list[Candidate], list[Occupant], list[Device], Limits],
) -> None:
    queue, running, machine, limits = situation
    if not queue:
        return
    head, *others = queue
    head = replace(head, priority=50)
    alone = _start_time(head, [], running, machine, limits)
    assert _start_time(head, others, running, machine, limits) == alone


def test_reasons_have_names_and_numbers() -> None:
    running = [Occupant(job_id="abc123", devices=(1,), output_dir="/x")]
    queue = [job("a", 1, num_devices=2, preferred=(0, 1)), job("b", 2, num_devices=1), job("c", 3, output_dir="/x")]
    first, second, third = plan(queue, running, devices(2), Limits(max_jobs=None), NOW)
    assert isinstance(first, Wait)
    assert (first.reason_code, first.reason) == ("gpus_busy", "Needs GPU 0,1; GPU 1 is used by job abc123")
    assert isinstance(second, Wait)
    assert second.reason_code == "behind_head"
    assert isinstance(third, Wait)
    assert third.reason_code == "output_dir_busy"
    limited = plan([job("a")], running, devices(2), Limits(max_jobs=1), NOW)[0]
    assert isinstance(limited, Wait)
    assert limited.reason_code == "job_limit"


def test_backfill_uses_what_the_head_does_not_need() -> None:
    running = [Occupant(job_id="r", devices=(0,))]
    queue = [job("head", 1, preferred=(0,)), job("small", 2)]
    assert plan(queue, running, devices(3), Limits(max_jobs=None), NOW)[1] == Start("small", (1,))


def test_waiting_raises_priority_up_to_twenty() -> None:
    old = job("a", queued_at=NOW - timedelta(minutes=25))
    assert effective_priority(10, old.queued_at, NOW) == 12
    assert effective_priority(10, NOW - timedelta(days=9), NOW) == 30


@given(situations(), st.data())
def test_a_paused_job_neither_starts_nor_stands_in_the_way(
    situation: tuple[list[Candidate], list[Occupant], list[Device], Limits], data: st.DataObject
) -> None:
    queue, running, machine, limits = situation
    paused = {job.job_id for job in queue if data.draw(st.booleans())}
    held = [replace(job, is_paused=job.job_id in paused) for job in queue]
    answers = {answer.job_id: answer for answer in plan(held, running, machine, limits, NOW)}
    without = plan([job for job in queue if job.job_id not in paused], running, machine, limits, NOW)
    for name in paused:
        answer = answers[name]
        assert isinstance(answer, Wait) and answer.reason_code == "paused"
    starts = {answer.job_id: answer.devices for answer in without if isinstance(answer, Start)}
    assert {name: answer.devices for name, answer in answers.items() if isinstance(answer, Start)} == starts
