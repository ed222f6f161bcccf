"""A server that dies takes nothing along, and the next one carries on."""

from __future__ import annotations

import os
import signal

from control_world import ServerProcess, processes_of, until


def test_a_killed_server_is_followed_without_gap(server: ServerProcess) -> None:
    job_id = server.start_job(max_train_steps=400)["job_id"]
    server.wait_status(job_id, "running")
    before = server.events()
    server.kill()
    assert server.folder(job_id).is_locked()
    server.start()
    until(lambda: server.events(since_index=before[-1]["index"] + 1, types="training.progress"))
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
    job_id = server.start_job(max_train_steps=300)["job_id"]
    server.wait_status(job_id, "running")
    server.kill()
    until(lambda: not server.folder(job_id).is_locked())
    stray = server.folder("stray").root
    stray.mkdir()
    server.start()
    server.wait_status(job_id, "completed")
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
    job = server.wait_status(job_id, "failed")
    assert job["exit"]["signal"] == signal.SIGKILL
    assert "trainer says hello" in job["exit"]["log_tail"]
    job_id = server.start_job()["job_id"]
    server.wait_status(job_id, "running")
    for process in processes_of(server.folder(job_id)):
        process.kill()
    server.wait_status(job_id, "lost")
    assert processes_of(server.folder(job_id)) == []
    assert server.get("/api/system/status?include_allocation=true")["gpu_allocation"]["allocated_gpus"] == []


def test_a_paused_job_gives_its_devices_back_and_goes_on_when_resumed(server: ServerProcess) -> None:
    first = server.start_job(max_train_steps=600)["job_id"]
    server.wait_status(first, "running")
    answer = server.http.post(f"/api/jobs/{first}/pause")
    assert answer.status_code == 202 and answer.json()["status"] == "stopping"
    paused = server.wait_status(first, "queued")
    assert paused["attempt"] == 1 and paused["allocated_gpus"] is None and "Paused" in paused["status_reason"]
    second = server.start_job(max_train_steps=5, output_dir="other")["job_id"]
    server.wait_status(second, "completed")
    server.kill()
    server.start()
    assert server.get(f"/api/jobs/{first}")["job"]["status"] == "queued", "the pause outlives the server"
    assert server.http.post(f"/api/jobs/{first}/pause").json()["code"] == "job_not_running"
    assert server.http.post(f"/api/jobs/{first}/resume").status_code == 202
    server.wait_status(first, "running", "completed")
    assert server.folder(first).read_spec().continues
    assert server.http.post(f"/api/jobs/{first}/resume").json()["code"] == "job_not_running"
    server.http.post(f"/api/jobs/{first}/cancel")
    server.wait_status(first, "cancelled", "completed")
    moves = [event["data"]["to"] for event in server.events(types="job.status") if event["job_id"] == first]
    assert moves[:6] == ["queued", "starting", "running", "stopping", "queued", "starting"]


def test_cancel_wins_over_a_pause(server: ServerProcess) -> None:
    job_id = server.start_job()["job_id"]
    server.wait_status(job_id, "running")
    server.http.post(f"/api/jobs/{job_id}/pause")
    server.http.post(f"/api/jobs/{job_id}/cancel")
    assert server.wait_status(job_id, "cancelled")["is_terminal"]
