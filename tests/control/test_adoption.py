"""A server that dies takes nothing along, and the next one carries on."""

from __future__ import annotations

import os
import signal
import time

from control_world import ServerProcess, processes_of, until


def test_a_killed_server_is_followed_without_gap(server: ServerProcess) -> None:
    job_id = server.start_job(max_train_steps=400)["job_id"]
    server.wait_status(job_id, "running")
    before = server.events()
    server.kill()
    assert server.folder(job_id).is_locked()
    begin = time.monotonic()
    server.start()
    until(lambda: server.events(since_index=before[-1]["index"] + 1, types="training.progress"))
    assert time.monotonic() - begin < 5
    server.kill()
    server.start()
    job = server.wait_status(job_id, "completed")
    assert job["attempt"] == 1
    everything = server.events()
    assert everything[: len(before)] == before
    assert [event["index"] for event in everything] == list(range(1, len(everything) + 1))
    assert len({event["id"] for event in everything}) == len(everything)
    steps = [event["progress"]["current"] for event in everything if event["type"] == "training.progress"]
    assert steps == list(range(1, 401))
    moves = [event["data"]["to"] for event in everything if event["type"] == "job.status"]
    assert moves == ["queued", "starting", "running", "completed"]


def test_what_ended_meanwhile_is_found_ended(server: ServerProcess) -> None:
    job_id = server.start_job(max_train_steps=30)["job_id"]
    server.wait_status(job_id, "running")
    server.kill()
    until(lambda: not server.folder(job_id).is_locked())
    stray = server.folder("stray").root
    stray.mkdir()
    server.start()
    server.wait_status(job_id, "completed", within_s=2)
    assert not stray.exists()


def test_a_stop_survives_the_server(server: ServerProcess) -> None:
    job_id = server.start_job()["job_id"]
    server.wait_status(job_id, "running")
    runner = next(process for process in processes_of(server.folder(job_id)) if "runner" in " ".join(process.cmdline()))
    os.kill(runner.pid, signal.SIGSTOP)
    server.http.post("/api/training/cancel")
    server.kill()
    # As if it had died between storing the request and sending it.
    server.folder(job_id).commands_path.unlink()
    server.start()
    os.kill(runner.pid, signal.SIGCONT)
    server.wait_status(job_id, "cancelled")


def test_killed_processes_are_seen_in_two_seconds(server: ServerProcess) -> None:
    job_id = server.start_job()["job_id"]
    server.wait_status(job_id, "running")
    trainer = next(process for process in processes_of(server.folder(job_id)) if "fake_trainer" in process.cmdline()[1])
    trainer.kill()
    job = server.wait_status(job_id, "failed", within_s=2)
    assert job["exit"]["signal"] == signal.SIGKILL
    assert "trainer says hello" in job["exit"]["log_tail"]
    job_id = server.start_job()["job_id"]
    server.wait_status(job_id, "running")
    for process in processes_of(server.folder(job_id)):
        process.kill()
    server.wait_status(job_id, "lost", within_s=2)
    assert processes_of(server.folder(job_id)) == []
    assert server.get("/api/system/status?include_allocation=true")["gpu_allocation"]["allocated_gpus"] == []
