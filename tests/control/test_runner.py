"""Real runners around a real little trainer: every way to end."""

from __future__ import annotations

import json
import signal
import time

import pytest
from control_world import World, processes_of, until

from simpletuner.errors import UserError
from simpletuner.events import read_journal
from simpletuner.job import JobStatus

SOON_S = 10
"""Two on a free core."""


def history(world: World, job_id: str) -> list[str]:
    ticks = [event.as_dict() for event in world.seen]
    return [event["data"]["to"] for event in ticks if event["type"] == "job.status" and event["job_id"] == job_id]


def test_a_job_completes_with_its_whole_history(world: World) -> None:
    job_id = world.submit(steps=3, chatter=2).job.job_id
    job = world.tick_until(job_id, JobStatus.COMPLETED)
    world.seen += world.supervisor.tick()
    assert history(world, job_id) == ["queued", "starting", "running", "completed"]
    assert job.exit is not None
    assert job.exit["code"] == 0
    assert "step 3 line 1" in job.exit["log_tail"]
    assert world.store.jobs.leases() == {}
    assert [event.index for event in world.seen] == list(range(1, len(world.seen) + 1))
    assert "trainer says hello" in world.folder(job_id).log_path.read_text()
    lines = [line for event in world.seen if event.type == "log" for line in event.as_dict()["data"]["lines"]]
    assert lines.count("step 2 line 0") == 1


def test_a_typed_failure_is_told_in_the_trainers_words(world: World) -> None:
    job_id = world.submit(error="dataset_empty", exit_code=65).job.job_id
    job = world.tick_until(job_id, JobStatus.FAILED)
    assert job.exit is not None
    assert (job.exit["code"], job.exit["error_code"], job.exit["message"]) == (65, "dataset_empty", "It broke.")
    assert job.exit["hint"] == "Mend it."
    assert job.status_reason == "It broke."


def test_a_trainer_without_room_for_its_last_words_is_spoken_for(world: World) -> None:
    job_id = world.submit(steps=1, exit_code=73).job.job_id
    job = world.tick_until(job_id, JobStatus.FAILED)
    assert job.exit is not None
    assert (job.exit["code"], job.exit["error_code"]) == (73, "disk_full") and job.exit["hint"]
    lines = [line for _, line in read_journal(world.folder(job_id).journal_path)]
    assert json.loads(lines[-1])["data"]["code"] == "disk_full"


def test_stop_ends_well(world: World) -> None:
    job_id = world.submit().job.job_id
    world.tick_until(job_id, JobStatus.RUNNING)
    assert world.supervisor.request_end(job_id, "stop").status is JobStatus.STOPPING
    job = world.tick_until(job_id, JobStatus.STOPPED)
    assert (job.mode, job.forced) == ("stop", False)


def test_stop_is_forced_after_the_grace_period(world: World) -> None:
    job_id = world.submit(ignores=True, stop_grace_s=0.5).job.job_id
    world.tick_until(job_id, JobStatus.RUNNING)
    world.supervisor.request_end(job_id, "stop")
    job = world.tick_until(job_id, JobStatus.STOPPED)
    assert job.forced


def test_cancel_needs_no_consent(world: World) -> None:
    job_id = world.submit(ignores=True).job.job_id
    world.tick_until(job_id, JobStatus.RUNNING)
    begin = time.monotonic()
    world.supervisor.request_end(job_id, "stop")
    world.supervisor.request_end(job_id, "cancel")
    job = world.tick_until(job_id, JobStatus.CANCELLED)
    assert time.monotonic() - begin < 5 * SOON_S
    assert job.mode == "cancel"
    until(lambda: not processes_of(world.folder(job_id)))


def test_a_queued_job_is_cancelled_at_once(world: World) -> None:
    first = world.submit().job.job_id
    second = world.submit()
    assert second.wait is not None
    assert second.wait.position == 1
    assert world.supervisor.request_end(second.job.job_id, "stop").status is JobStatus.CANCELLED
    world.supervisor.request_end(first, "cancel")
    world.tick_until(first, JobStatus.CANCELLED)


def test_the_next_job_starts_by_itself(world: World) -> None:
    first = world.submit(steps=2).job.job_id
    second = world.submit(steps=2).job.job_id
    assert world.job(second).status is JobStatus.QUEUED
    world.tick_until(second, JobStatus.COMPLETED)
    assert world.job(first).status is JobStatus.COMPLETED


def test_no_wait_leaves_nothing_behind(world: World) -> None:
    world.submit()
    with pytest.raises(UserError, match="Rejected") as refused:
        world.submit(no_wait=True)
    assert refused.value.code == "gpus_unavailable"
    with pytest.raises(UserError, match="needs 3 slots; the largest machine has 1"):
        world.submit(num_processes=3)
    assert len(list((world.state / "jobs").iterdir())) == 1


def test_killed_trainer_is_a_failure_with_its_signal(world: World) -> None:
    job_id = world.submit(chatter=1).job.job_id
    world.tick_until(job_id, JobStatus.RUNNING)
    world.trainer(job_id).send_signal(signal.SIGKILL)
    begin = time.monotonic()
    job = world.tick_until(job_id, JobStatus.FAILED)
    assert time.monotonic() - begin < SOON_S
    assert job.exit is not None
    assert (job.exit["code"], job.exit["signal"]) == (None, signal.SIGKILL)
    assert "memory" in job.exit["hint"]
    assert job.exit["log_tail"]


def test_killed_runner_takes_its_trainer_along(world: World) -> None:
    job_id = world.submit().job.job_id
    world.tick_until(job_id, JobStatus.RUNNING)
    world.runner(job_id).send_signal(signal.SIGKILL)
    begin = time.monotonic()
    world.tick_until(job_id, JobStatus.LOST)
    assert time.monotonic() - begin < SOON_S
    until(lambda: not processes_of(world.folder(job_id)))
    assert world.store.jobs.leases() == {}


def test_sigterm_to_the_runner_is_a_stop(world: World) -> None:
    job_id = world.submit().job.job_id
    world.tick_until(job_id, JobStatus.RUNNING)
    world.runner(job_id).send_signal(signal.SIGTERM)
    assert not world.tick_until(job_id, JobStatus.STOPPED).forced


def test_yield_goes_back_to_the_queue_and_resumes(world: World) -> None:
    job_id = world.submit().job.job_id
    world.tick_until(job_id, JobStatus.RUNNING)
    world.supervisor.request_end(job_id, "yield")
    world.tick_until(job_id, JobStatus.STARTING)
    job = world.tick_until(job_id, JobStatus.RUNNING)
    assert job.attempt == 1


def test_a_next_server_adopts_what_runs(world: World) -> None:
    job_id = world.submit(steps=60).job.job_id
    world.tick_until(job_id, JobStatus.STARTING)
    world.store.close()
    stray = world.state / "jobs" / "stray"
    stray.mkdir()
    heir = World(world.state)
    assert heir.placement.remove_strays() == ["stray"]
    job = heir.tick_until(job_id, JobStatus.COMPLETED)
    assert job.exit is not None
    rows = heir.store.events.of_type(job_id, "training.progress")
    assert [row.as_dict()["progress"]["current"] for row in rows] == list(range(1, 61))
    heir.close()
