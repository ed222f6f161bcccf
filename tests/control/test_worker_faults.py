"""Jobs on workers end as they would have undisturbed, whatever fails in between; nobody writes after the lease."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from control_world import until
from worker_world import LEASE_S, WorkerProcess, WorkerWorld

pytestmark = pytest.mark.slow
STEPS = 60


def behaviour(**more: Any) -> dict[str, Any]:
    return {"steps": STEPS, "step_s": 0.02, "saves": 10, "draws": True, "chatter": 1} | more


@pytest.fixture
def world(tmp_path: Path) -> Iterator[WorkerWorld]:
    built = WorkerWorld(tmp_path)
    yield built
    built.close()


def undisturbed(steps: int = STEPS) -> list[str]:
    return [f"step {step}" for step in range(1, steps + 1)]


def test_a_job_on_a_worker_is_one_at_the_server(world: WorkerWorld) -> None:
    worker = world.add("--label", "gpu_type=a100-80", **behaviour())
    job_id = world.submit(worker_labels={"gpu_type": "a100*"})
    job = world.wait(job_id, "completed", "failed", "lost")
    assert (job["status"], job["attempt"], job["worker_id"]) == ("completed", 1, worker.worker_id)
    assert world.steps_told(job_id) == [(1, step) for step in range(1, STEPS + 1)]
    assert world.weights() == undisturbed()
    output = world.workspace / "output" / "job"
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-50", "checkpoint-60"]
    log = world.server.get(f"/api/jobs/{job_id}/logs", params={"format": "json"})["logs"]
    assert "trainer says hello" in str(log) and f"step {STEPS} line 0" in str(log)
    [picture] = [item for item in world.server.get(f"/api/jobs/{job_id}/artifacts") if item["kind"] == "image"]
    assert world.server.http.get(picture["url"]).content == b"not really a picture"
    saved = world.server.events(job_id=job_id, types="training.checkpoint")
    assert saved[-1]["checkpoint"]["path"] == str(output / "checkpoint-60"), "paths are the server's"
    until(lambda: worker.status() == "idle")
    assert not worker.processes() and not worker.run_folder(job_id, 1).exists()
    # A second one finds the pictures there; a server that goes down meanwhile does not wait for who listens.
    objects = {path.name: path.stat().st_ino for path in worker.folder.rglob("objects/*/*")}
    assert len(objects) == 2
    again = world.submit("again")
    world.until_step(again, 5)
    assert world.server.stop() == 0
    assert "graceful shutdown exceeded" not in (world.workspace / "server.log").read_text()
    world.server.start()
    assert world.wait(again, "completed", "failed", "lost")["status"] == "completed"
    assert {path.name: path.stat().st_ino for path in worker.folder.rglob("objects/*/*")} == objects


@pytest.mark.long
def test_a_short_cut_is_no_matter(world: WorkerWorld) -> None:
    worker = world.add(**behaviour(steps=150))
    job_id = world.submit()
    world.until_step(job_id, 20)
    worker.line.cut()
    time.sleep(LEASE_S / 3)
    worker.line.mend()
    job = world.wait(job_id, "completed", "failed", "lost")
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert world.steps_told(job_id) == [(1, step) for step in range(1, 151)]


def test_a_long_cut_ends_the_attempt_before_the_next_begins(world: WorkerWorld) -> None:
    first = world.add(**behaviour(steps=400))
    job_id = world.submit()
    second = world.add(**behaviour(steps=400, step_s=0.001))
    world.until_step(job_id, 25)
    until(lambda: world.saved() >= 20)
    first.line.cut()
    until(lambda: world.server.get(f"/api/jobs/{job_id}")["job"]["attempt"] == 2)
    assert not any("fake_trainer" in " ".join(process.cmdline()) for process in first.processes())
    job = world.wait(job_id, "completed", "failed", "lost")
    assert (job["status"], job["attempt"], job["worker_id"]) == ("completed", 2, second.worker_id)
    assert world.weights() == undisturbed(400)
    first.line.mend()
    until(lambda: not first.processes())
    attempts = [attempt for attempt, _ in world.steps_told(job_id)]
    assert attempts == sorted(attempts) and world.weights() == undisturbed(400)
    until(lambda: first.status() in {"quarantined", "idle"})


@pytest.mark.parametrize(
    "victim", ["keeper", *(pytest.param(other, marks=pytest.mark.long) for other in ("trainer", "machine"))]
)
def test_killed(world: WorkerWorld, victim: str) -> None:
    first = world.add(**behaviour(steps=400))
    job_id = world.submit()
    world.add(**behaviour(steps=400, step_s=0.001))
    world.until_step(job_id, 25)
    until(lambda: world.saved() >= 20)
    if victim == "machine":
        first.die()
    else:
        getattr(first, victim)().send_signal(signal.SIGKILL)
    job = world.wait(job_id, "completed", "failed", "lost")
    assert (job["status"], job["attempt"]) == ("completed", 2)
    assert world.weights() == undisturbed(400)
    assert not first.processes()


@pytest.mark.long
def test_the_server_is_killed_and_comes_back(world: WorkerWorld) -> None:
    world.add(**behaviour(steps=200))
    job_id = world.submit()
    world.until_step(job_id, 20)
    world.server.kill()
    world.server.start()
    job = world.wait(job_id, "completed", "failed", "lost")
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert world.steps_told(job_id) == [(1, step) for step in range(1, 201)]


@pytest.mark.long
def test_the_server_is_away_for_longer_than_the_lease(world: WorkerWorld) -> None:
    worker = world.add(**behaviour(steps=500))
    job_id = world.submit()
    world.until_step(job_id, 20)
    world.server.kill()
    until(lambda: not any("fake_trainer" in " ".join(process.cmdline()) for process in worker.processes()))
    world.server.start()
    job = world.wait(job_id, "completed", "failed", "lost")
    assert (job["status"], job["attempt"]) == ("completed", 2)
    assert world.weights() == undisturbed(500)
    # What it had saved when it was stopped had reached the server: no step was done twice.
    steps = [step for _, step in world.steps_told(job_id)]
    assert steps == sorted(set(steps))


@pytest.mark.long
def test_a_frozen_runner_finds_the_fence(world: WorkerWorld) -> None:
    first = world.add(**behaviour(steps=400))
    job_id = world.submit()
    world.add(**behaviour(steps=400, step_s=0.001))
    world.until_step(job_id, 25)
    until(lambda: world.saved() >= 20)
    keeper = first.keeper()
    keeper.send_signal(signal.SIGSTOP)
    job = world.wait(job_id, "completed", "failed", "lost")
    assert (job["status"], job["attempt"]) == ("completed", 2)
    told, journal = world.steps_told(job_id), world.server.folder(job_id).journal_path.read_bytes()
    keeper.send_signal(signal.SIGCONT)
    until(lambda: not first.processes())
    assert world.steps_told(job_id) == told and world.server.folder(job_id).journal_path.read_bytes() == journal
    assert world.weights() == undisturbed(400)


@pytest.mark.long
def test_an_ephemeral_worker_that_must_go_hands_its_job_on(world: WorkerWorld) -> None:
    first = world.add(**behaviour(steps=400))
    job_id = world.submit()
    world.add(**behaviour(steps=400, step_s=0.001))
    world.until_step(job_id, 15)
    first.process.terminate()
    assert first.process.wait(timeout=20) == 0
    job = world.wait(job_id, "completed", "failed", "lost")
    assert (job["status"], job["attempt"]) == ("completed", 2) and first.status() == "offline"
    steps = [step for _, step in world.steps_told(job_id)]
    assert steps == sorted(set(steps)) and world.weights() == undisturbed(400)


@pytest.mark.long
def test_a_persistent_worker_finds_its_job_again(world: WorkerWorld) -> None:
    worker = world.add("--persistent", **behaviour(steps=200))
    job_id = world.submit()
    world.until_step(job_id, 15)
    worker.process.terminate()
    assert worker.process.wait(timeout=20) == 0
    worker.start()
    job = world.wait(job_id, "completed", "failed", "lost")
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert world.steps_told(job_id) == [(1, step) for step in range(1, 201)]


def test_stop_pause_and_cancel_reach_a_worker(world: WorkerWorld) -> None:
    worker = world.add(**behaviour(steps=0))
    job_id = world.submit()
    world.until_step(job_id, 5)
    assert world.server.http.post(f"/api/jobs/{job_id}/pause").status_code == 202
    world.wait(job_id, "queued")
    paused_at = world.step(job_id)
    assert len(world.weights()) == paused_at, "a pause saves"
    until(lambda: worker.status() == "idle")
    assert world.server.http.post(f"/api/jobs/{job_id}/resume").status_code == 202
    world.until_step(job_id, paused_at + 5)
    assert world.server.http.post(f"/api/jobs/{job_id}/stop").status_code == 202
    job = world.wait(job_id, "stopped")
    assert job["attempt"] == 1 and world.weights() == undisturbed(world.step(job_id))
    cancelled = world.submit("other")
    world.until_step(cancelled, 5)
    began = time.monotonic()
    assert world.server.http.post(f"/api/jobs/{cancelled}/cancel").status_code == 202
    world.wait(cancelled, "cancelled")
    assert time.monotonic() - began < 10
    until(lambda: worker.status() == "idle")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(int(os.environ.get("WORKER_FAULTS", "1"))))
def test_whatever_fails_whenever(world: WorkerWorld, seed: int) -> None:
    """Three faults one after another, at random moments: the weights are those of an undisturbed run, told in order."""
    draw = random.Random(seed)
    for _ in range(2):
        world.add(**behaviour(steps=400, step_s=0.005))
    job_id = world.submit(max_attempts=20)
    for _ in range(3):
        time.sleep(draw.uniform(0.2, 2.0))
        job = world.server.get(f"/api/jobs/{job_id}")["job"]
        holder = next((worker for worker in world.workers if worker.worker_id == job["worker_id"]), world.workers[0])
        disturb(world, holder, draw)
    job = world.wait(job_id, "completed", "failed", "lost", within_s=120)
    assert job["status"] == "completed", job["status_reason"]
    assert world.weights() == undisturbed(400)
    told = world.steps_told(job_id)
    assert [attempt for attempt, _ in told] == sorted(attempt for attempt, _ in told)
    for attempt in {attempt for attempt, _ in told}:
        steps = [step for number, step in told if number == attempt]
        assert steps == list(range(steps[0], steps[0] + len(steps))), "no gap within an attempt, and nothing twice"


def disturb(world: WorkerWorld, holder: WorkerProcess, draw: random.Random) -> None:
    what = draw.choice(["cut", "kill job", "kill server", "kill agent", "freeze"])
    if what == "cut":
        holder.line.cut()
        time.sleep(draw.uniform(0.2, 1.5 * LEASE_S))
        holder.line.mend()
    elif what == "kill server":
        world.server.kill()
        time.sleep(draw.uniform(0, 1.5 * LEASE_S))
        world.server.start()
    elif what == "kill agent":
        holder.process.kill()
        holder.process.wait()
        holder.start()
    elif victims := holder.processes():
        with suppress(psutil.NoSuchProcess):
            victim = draw.choice(victims)
            victim.send_signal(signal.SIGKILL if what == "kill job" else signal.SIGSTOP)
            if what == "freeze":
                time.sleep(draw.uniform(0.2, 1.5 * LEASE_S))
                victim.send_signal(signal.SIGCONT)


def test_a_worker_that_cannot_take_a_job_says_so(world: WorkerWorld) -> None:
    """A file stands where its jobs would be; with a wrong token it ends, and says what is wrong."""
    worker = world.add(**behaviour())
    (worker.folder / ".simpletuner" / "worker" / "w0" / "jobs").write_text("")
    job_id = world.submit()
    job = world.wait(job_id, "queued")
    told = [event["message"] for event in world.server.events(job_id=job_id, types="job.status")]
    assert told[-1].startswith("Its worker refused it: w0 cannot store it") and job["attempt"] == 1
    assert world.server.get("/api/queue")["entries"][0]["reason"] == "Needs a worker: w0 is busy."
    refused = worker.run_again(SIMPLETUNER_WORKER_TOKEN="wt_wrong", SIMPLETUNER_STATE_DIR="other")
    assert refused.returncode == 5 and "is not valid" in refused.stderr and "Traceback" not in refused.stderr
    second = worker.run_again()
    assert second.returncode == 73 and "Another worker w0 runs" in second.stderr


def test_tokens_and_epochs(world: WorkerWorld) -> None:
    worker = world.add(**behaviour(steps=0))
    job_id, other = world.submit(), world.submit("other")
    world.until_step(job_id, 5)
    told = json.loads((worker.run_folder(job_id, 1) / "assignment.json").read_text())
    folder = world.server.folder(job_id)
    http = httpx2.Client(base_url=world.server.url)

    def codes(job: str, token: str | None, epoch: int) -> set[tuple[int, str]]:
        headers = {"X-Upload-Token": token} if token else {}
        calls: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", f"/api/workers/job/{job}/lease", {"json": {"epoch": epoch, "wait": 0}}),
            ("POST", f"/api/workers/job/{job}/ack", {"json": {"epoch": epoch, "accepted": False}}),
            (
                "POST",
                f"/api/workers/job/{job}/status",
                {"json": {"epoch": epoch, "status": "ended", "exit": {"code": 0}}},
            ),
            ("PUT", f"/api/workers/job/{job}/journal?epoch={epoch}&offset=0", {"content": b"{}\n"}),
            ("PUT", f"/api/workers/job/{job}/log?epoch={epoch}&offset=0", {"content": b"x"}),
            ("GET", f"/api/cloud/storage/{job}/inputs.json?epoch={epoch}", {}),
            ("PUT", f"/api/cloud/storage/{job}/outputs.json?epoch={epoch}", {"json": {"files": {}}}),
        ]
        answers = [http.request(method, path, headers=headers, **more) for method, path, more in calls]
        return {(answer.status_code, answer.json()["code"]) for answer in answers}

    token: str = told["upload_token"]
    forged = token[:-1] + ("0" if token[-1] != "0" else "1")
    assert codes(job_id, None, 1) == {(401, "unauthenticated")}
    assert codes(job_id, forged, 1) == {(401, "invalid_credentials")}
    assert codes(other, token, 1) == {(403, "permission_denied")}
    assert codes(job_id, token, 2) == {(409, "stale_lease")}, "a worker that lies about its epoch"
    world.server.http.post(f"/api/jobs/{job_id}/stop")
    world.wait(job_id, "stopped")
    journal, exit_record = folder.journal_path.read_bytes(), folder.read_exit()
    assert codes(job_id, token, 1) == {(409, "stale_lease")}
    assert (folder.journal_path.read_bytes(), folder.read_exit()) == (journal, exit_record)
    http.close()
