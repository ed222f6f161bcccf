"""Laws of the plan, and what its answers say."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.jobs.devices import Device
from simpletuner.jobs.scheduler import Candidate, Limits, Occupant, Start, Wait, effective_priority, plan
from simpletuner.jobs.worker_choice import fits
from simpletuner.jobs.worker_slot import WorkerSlot

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
            user_id=draw(st.sampled_from("xy")),
        )
        for order in range(draw(st.integers(0, 6)))
    ]
    free = list(range(count))
    running: list[Occupant] = []
    while free and draw(st.booleans()):
        held = tuple(free.pop() for _ in range(draw(st.integers(1, len(free)))))
        user = draw(st.sampled_from("xy"))
        name = f"r{len(running)}"
        running.append(Occupant(job_id=name, devices=held, output_dir=f"/{name}", user_id=user))
    most = st.none() | st.integers(1, 4)
    limits = Limits(
        max_jobs=draw(most), max_devices=draw(most), max_jobs_per_user=draw(most), fair_share=draw(st.booleans())
    )
    return queue, running, devices(count), limits


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
    for user in {by_id[start.job_id].user_id for start in starts}:
        theirs = [occupant for occupant in running if occupant.user_id == user]
        count = len(theirs) + sum(by_id[start.job_id].user_id == user for start in starts)
        assert limits.max_jobs_per_user is None or count <= limits.max_jobs_per_user
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
                job_id=started.job_id,
                devices=answer.devices,
                output_dir=started.output_dir,
                user_id=started.user_id,
            )
            heapq.heappush(ends, _End(now + _lasts(started.job_id), started.job_id))
        if not ends:
            return -1
        now = ends[0].at
        while ends and ends[0].at == now:
            del active[heapq.heappop(ends).job_id]


def _lasts(name: str) -> int:
    return 1 + sum(name.encode()) * 7 % 11


def _own_rule(answer: Start | Wait) -> bool:
    return isinstance(answer, Wait) and answer.reason_code in {"user_limit", "output_dir_busy"}


@given(situations())
def test_the_head_is_never_delayed_by_who_comes_later(
    situation: tuple[list[Candidate], list[Occupant], list[Device], Limits],
) -> None:
    queue, running, machine, limits = situation
    if not queue:
        return
    head, *others = queue
    head = replace(head, priority=50)
    if _own_rule(plan([head], running, machine, limits, NOW)[0]):
        return
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


@given(situations())
def test_all_that_can_run_at_all_run_in_the_end(
    situation: tuple[list[Candidate], list[Occupant], list[Device], Limits],
) -> None:
    queue, running, machine, limits = situation
    for candidate in queue:
        fits = limits.max_devices is None or candidate.num_devices <= limits.max_devices
        assert (
            _start_time(candidate, [each for each in queue if each != candidate], running, machine, limits) >= 0
        ) is fits


def test_a_low_priority_is_not_starved_by_who_comes_later() -> None:
    """One device, a job a minute, and each minute another of ten more comes."""
    queue = [job("low", 0, priority=0)]
    for minute in range(200):
        now = NOW + timedelta(minutes=minute)
        queue += [job(f"q{minute}-{each}", 2 * minute + each + 1, priority=10, queued_at=now) for each in range(2)]
        [first] = [answer for answer in plan(queue, [], devices(1), Limits(), now) if isinstance(answer, Start)]
        if first.job_id == "low":
            break
        queue = [candidate for candidate in queue if candidate.job_id != first.job_id]
    assert 100 <= minute <= 199


def test_ties_go_to_the_user_with_fewer_running() -> None:
    running = [Occupant(job_id=f"r{at}", devices=(at,), user_id=user) for at, user in enumerate("aab")]
    queue = [job(f"{user}{order}", order, user_id=user) for order, user in enumerate("aaabbc")]
    answers = plan(queue, running, devices(9), Limits(max_jobs=None, fair_share=True), NOW)
    # Running are a 2, b 1, c 0: c has 1, then b and c are even, and so on.
    assert [answer.job_id for answer in answers] == ["c5", "b3", "a0", "b4", "a1", "a2"]
    urgent = [replace(queue[2], priority=30), *queue]
    assert plan(urgent, running, devices(9), Limits(max_jobs=None, fair_share=True), NOW)[0].job_id == "a2"
    first = plan(queue, running, devices(9), Limits(max_jobs=None), NOW)
    assert [answer.job_id for answer in first] == [candidate.job_id for candidate in queue]


@pytest.mark.parametrize(
    ("held", "code"),
    [
        ({"needs_approval": True}, "needs_approval"),
        ({"target": "worker"}, "no_matching_worker"),
        ({"num_devices": 2}, "gpu_limit"),
        ({"preferred": (7,)}, "gpus_busy"),
        ({"peak_bytes": 25 * 2**30}, "gpu_memory"),
        ({"user_id": "busy"}, "user_limit"),
    ],
)
def test_what_holds_one_job_holds_no_other(held: dict[str, object], code: str) -> None:
    running = [Occupant(job_id="r", devices=(2,), user_id="busy")]
    limits = Limits(max_jobs=2, max_devices=1 if code == "gpu_limit" else None, max_jobs_per_user=1)
    running = [] if code == "gpu_limit" else running
    answers = plan([job("held", 1, priority=50, **held), job("free", 2)], running, devices(3), limits, NOW)
    by_id = {answer.job_id: answer for answer in answers}
    assert by_id["free"] == Start("free", (0,))
    waits = by_id["held"]
    assert isinstance(waits, Wait) and (waits.reason_code, waits.position) == (code, 1)


def test_memory_that_others_hold_is_not_promised() -> None:
    free = {0: 2 * 10**9, 1: 20 * 10**9}
    running = [Occupant(job_id="r", devices=(2,))]
    queue = [
        job("any", 1, peak_bytes=15 * 10**9),
        job("first", 2, peak_bytes=15 * 10**9, preferred=(0,)),
        job("small", 3, peak_bytes=10**9, preferred=(0,)),
        job("two", 4, peak_bytes=15 * 10**9, num_devices=3),
        job("unknown", 5),
    ]
    answers = {each.job_id: each for each in plan(queue, running, devices(3), Limits(max_jobs=None), NOW, free)}
    assert answers["any"] == Start("any", (1,))
    assert answers["small"] == Start("small", (0,))
    reasons = {name: each.reason for name, each in answers.items() if isinstance(each, Wait)}
    assert reasons == {
        "first": "Needs 15.0 GB on GPU 0; 2.0 GB are free there.",
        "two": "Needs 15.0 GB on 3 GPU(s); 2 have so much free, the most is 25.8 GB.",
        "unknown": "Needs 1 GPU(s); 0 of 3 are free.",
    }
    busy = plan([job("later", 1, peak_bytes=15 * 10**9)], running, devices(3)[2:], Limits(max_jobs=None), NOW, {})
    assert isinstance(busy[0], Wait) and busy[0].reason_code == "gpus_busy"
    assert plan(queue[1:2], [], devices(3), Limits(), NOW, {0: 16 * 10**9}) == [Start("first", (0,))]


FLEETS = st.lists(
    st.builds(
        WorkerSlot,
        worker_id=st.sampled_from(["w0", "w1", "w2"]),
        name=st.just("box"),
        num_devices=st.integers(1, 5),
        status=st.sampled_from(["idle", "idle", "busy"]),
        labels=st.sampled_from([{}, {"gpu": "a100"}]),
        idle_since=st.floats(0, 9),
    ),
    max_size=3,
    unique_by=lambda slot: slot.worker_id,
)
WISHES = st.lists(
    st.tuples(st.sampled_from(["auto", "local", "worker"]), st.sampled_from([{}, {"gpu": "a*"}])),
    min_size=6,
    max_size=6,
)


@given(situations(), FLEETS, WISHES)
def test_workers_take_what_fits_and_leave_this_machine_as_it_was(
    situation: tuple[list[Candidate], list[Occupant], list[Device], Limits],
    fleet: list[WorkerSlot],
    wishes: list[tuple[str, dict[str, str]]],
) -> None:
    plain, running, machine, limits = situation
    queue = [
        replace(candidate, target=target, worker_labels=labels)
        for candidate, (target, labels) in zip(plain, wishes, strict=False)
    ]
    by_id = {candidate.job_id: candidate for candidate in queue}
    answers = plan(queue, running, machine, limits, NOW, None, fleet)
    remote = [answer for answer in answers if isinstance(answer, Start) and answer.worker_id is not None]
    idle = {slot.worker_id: slot for slot in fleet if slot.status == "idle"}
    assert len({start.worker_id for start in remote}) == len(remote)
    for start in remote:
        wanted = by_id[start.job_id]
        assert wanted.target != "local" and fits(idle.pop(start.worker_id or ""), wanted)
        assert start.devices == tuple(range(wanted.num_devices))
    for answer in answers:
        wanted = by_id[answer.job_id]
        if isinstance(answer, Start) and answer.worker_id is None:
            assert wanted.target != "worker"
        if isinstance(answer, Wait) and wanted.target != "local" and answer.reason_code not in _OWN_RULES:
            assert not any(fits(slot, wanted) for slot in idle.values()), "one that it could have is idle"
    # What is left for this machine is planned as if there were no workers: on them jobs count for their user alone.
    gone = {start.job_id for start in remote}
    if limits.max_jobs_per_user is None and not limits.fair_share:
        held = {by_id[start.job_id].output_dir for start in remote}
        local = [each for each in queue if each.job_id not in gone and each.target != "worker"]
        if not any(each.output_dir in held for each in local):
            starts = {answer.job_id: answer for answer in answers if isinstance(answer, Start)}
            for answer in plan(local, running, machine, limits, NOW):
                if isinstance(answer, Start) and not _shares_a_folder(by_id[answer.job_id], queue):
                    assert starts[answer.job_id] == answer


_OWN_RULES = {"output_dir_busy", "user_limit"}


def _shares_a_folder(job: Candidate, queue: list[Candidate]) -> bool:
    return sum(other.output_dir == job.output_dir for other in queue) > 1


def test_jobs_on_workers_count_for_their_user_and_their_folder_alone() -> None:
    there = Occupant(job_id="there", devices=(0,), output_dir="/a", user_id="x", worker_id="w0")
    limits = Limits(max_jobs=1, max_devices=1, max_jobs_per_user=1)
    mine, same, other = (
        job("mine", 1, user_id="x"),
        job("same", 2, user_id="y", output_dir="/a"),
        job("other", 3, user_id="y", output_dir="/b"),
    )
    found = {answer.job_id: answer for answer in plan([mine, same, other], [there], devices(1), limits, NOW)}
    assert isinstance(found["mine"], Wait) and found["mine"].reason_code == "user_limit"
    assert isinstance(found["same"], Wait) and found["same"].reason_code == "output_dir_busy"
    assert found["other"] == Start("other", (0,))


def test_a_job_too_large_for_this_machine_waits_for_a_worker_and_stops_nobody() -> None:
    large, small = job("large", 1, num_devices=4), job("small", 2)
    box = WorkerSlot(worker_id="w", name="box", num_devices=4, status="busy")
    wait, start = plan([large, small], [], devices(1), Limits(), NOW, None, [box])
    assert isinstance(wait, Wait) and (wait.reason_code, wait.reason) == (
        "workers_busy",
        "Needs a worker with 4 devices: box is busy.",
    )
    assert start == Start("small", (0,))
