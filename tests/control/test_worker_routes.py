"""Making workers, letting them in, giving them jobs: the application in this process, its workers are the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from account_world import AccountWorld
from listener import Listener

import simpletuner
from simpletuner.job import JobStatus
from simpletuner.jobs.fleet import Fleet
from simpletuner.jobs.worker_slot import WorkerTimers
from simpletuner.store.job_row import NewJob

WORKERS = "/api/admin/workers"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[AccountWorld]:
    built = AccountWorld(tmp_path)
    built.add_users("researcher", "admin")
    yield built
    built.close()


def make(world: AccountWorld, name: str, **body: Any) -> dict[str, Any]:
    answer = world.ask("POST", WORKERS, by="admin", json={"name": name, **body})
    assert answer.status_code == 201, answer.text
    return answer.json()


def register(world: AccountWorld, made: dict[str, Any], name: str, *, count: int = 1, **body: Any) -> httpx2.Response:
    info = {"name": "A100", "count": count, "vram_gb": 80.0, "driver": "555", "accelerator": "cuda"}
    told = {"name": name, "gpu_info": info, "version": simpletuner.__version__} | body
    return as_worker(world, made, "POST", "/api/workers/register", json=told)


def as_worker(world: AccountWorld, made: dict[str, Any], method: str, path: str, **more: Any) -> httpx2.Response:
    return world.ask(method, path, headers={"X-Worker-Token": made["token"]}, **more)


def connect(world: AccountWorld, name: str, **more: Any) -> dict[str, Any]:
    """One that is idle."""
    made = make(world, name)
    assert register(world, made, name, **more).status_code == 200
    assert poll(world, made) == []
    return made


def poll(world: AccountWorld, made: dict[str, Any], wait: float = 0) -> list[dict[str, Any]]:
    answer = as_worker(world, made, "GET", f"/api/workers/queue?worker_id={made['worker_id']}&wait={wait}")
    assert answer.status_code == 200, answer.text
    return answer.json()["messages"]


def listed(world: AccountWorld) -> dict[str, dict[str, Any]]:
    return {worker["name"]: worker for worker in world.ask("GET", WORKERS, by="admin").json()["workers"]}


def give_job(world: AccountWorld, job_id: str = "job", **more: Any) -> str:
    """A job that only a worker may have, frozen as a submit does it."""
    new = NewJob(job_id=job_id, output_dir=str(world.workspace / "output" / job_id), target="worker", **more)
    world.core.store.jobs.insert(new)
    folder = world.core.placement.job_dir(job_id)
    folder.artifacts.mkdir(parents=True)
    config = {"output_dir": new.output_dir, "pretrained_model_name_or_path": "a/model", "resume_from_checkpoint": None}
    (folder.root / "config.json").write_text(json.dumps({"config": config, "provenance": {}}))
    (folder.root / "datasets.json").write_text("[]")
    spec = {"job_id": job_id, "workspace": "/w", "config_dir": "/w", "output_dir": new.output_dir}
    (folder.root / "spec.json").write_text(json.dumps(spec))
    world.core.supervisor.replan()
    world.core.supervisor.tick()
    return job_id


def code(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_a_worker_is_made_once_and_its_token_kept_as_a_hash(world: AccountWorld, tmp_path: Path) -> None:
    made = make(world, "box", labels={"zone": "a"})
    assert made["worker_id"].startswith("w_") and made["token"].startswith("wt_") and len(made["token"]) == 35
    assert made["token"] in made["connection_command"] and "--name box" in made["connection_command"]
    assert code(world.ask("POST", WORKERS, by="admin", json={"name": "box"})) == (409, "already_exists")
    shown = listed(world)["box"]
    assert (shown["status"], shown["gpu_count"], shown["labels"], shown["connected"]) == (
        "offline",
        0,
        {"zone": "a"},
        False,
    )
    database = b"".join(path.read_bytes() for path in (tmp_path / ".simpletuner").glob("simpletuner.db*"))
    assert made["worker_id"].encode() in database and made["token"].encode() not in database
    assert code(world.ask("POST", WORKERS, by="researcher", json={"name": "x"})) == (403, "permission_denied")
    for method, path in (("PATCH", ""), ("DELETE", ""), ("POST", "/drain"), ("POST", "/undrain"), ("POST", "/token")):
        answer = world.ask(method, f"{WORKERS}/w_nobody{path}", by="admin", json={} if method == "PATCH" else None)
        assert code(answer) == (404, "unknown_worker")


def test_its_token_opens_what_is_its_own_and_nothing_else(world: AccountWorld) -> None:
    made, other = connect(world, "a"), connect(world, "b")
    path = f"/api/workers/queue?worker_id={made['worker_id']}"
    assert code(as_worker(world, other, "GET", path)) == (403, "permission_denied")
    assert code(world.ask("GET", path, by="admin")) == (401, "unauthenticated")
    assert code(world.ask("GET", path, headers={"X-Worker-Token": "wt_wrong"})) == (401, "invalid_credentials")
    for foreign in ("/api/jobs", WORKERS, "/api/workers/job/x/lease"):
        assert as_worker(world, made, "POST" if "lease" in foreign else "GET", foreign).status_code == 401
    renewed = world.ask("POST", f"{WORKERS}/{made['worker_id']}/token", by="admin").json()
    assert code(as_worker(world, made, "GET", path)) == (401, "invalid_credentials")
    assert poll(world, made | {"token": renewed["token"]}) == []


def test_who_may_register(world: AccountWorld) -> None:
    made = make(world, "a")
    make(world, "taken")
    refused = register(world, made, "a", version="0.0.1")
    assert code(refused) == (409, "version_mismatch")
    assert "0.0.1" in refused.json()["detail"] and simpletuner.__version__ in refused.json()["detail"]
    assert code(register(world, made, "taken")) == (409, "already_exists")
    answer = register(world, made, "a", count=2, labels={"gpu": "a100"}, leases=[{"job_id": "old", "epoch": 3}]).json()
    assert answer["leases"] == [{"job_id": "old", "epoch": 3, "verdict": "abandon"}]
    assert (answer["heartbeat_s"], answer["lease_s"]) == (30.0, 120.0)
    shown = listed(world)["a"]
    assert (shown["status"], shown["gpu_name"], shown["gpu_count"], shown["gpu_vram_gb"]) == (
        "connecting",
        "A100",
        2,
        80,
    )
    assert shown["labels"] == {"gpu": "a100"} and shown["version"] == simpletuner.__version__
    changed = world.ask("PATCH", f"{WORKERS}/{made['worker_id']}", by="admin", json={"labels": {"gpu": "h100"}})
    assert changed.status_code == 200 and listed(world)["a"]["labels"] == {"gpu": "h100"}, "the server's win"


def test_what_a_worker_says_of_itself_is_checked(world: AccountWorld) -> None:
    """A memory of infinity would have ended every plan of the queue."""
    made = make(world, "a")
    headers = {"X-Worker-Token": made["token"], "Content-Type": "application/json"}
    info = {"name": "A100", "count": 1}
    told = {"name": "a", "gpu_info": info, "version": simpletuner.__version__}
    for wrong in ("1e999", "NaN", "-1"):
        text = json.dumps(told | {"gpu_info": info | {"vram_gb": 0.5}}).replace("0.5", wrong)
        refused = world.ask("POST", "/api/workers/register", headers=headers, content=text)
        assert refused.status_code == 422 and refused.json()["errors"][0]["pointer"] == "/gpu_info/vram_gb"
        beat = json.dumps({"worker_id": made["worker_id"], "status": "idle", "vram_used_gb": 0.5}).replace("0.5", wrong)
        refused = world.ask("POST", "/api/workers/heartbeat", headers=headers, content=beat)
        assert refused.status_code == 422 and refused.json()["errors"][0]["pointer"] == "/vram_used_gb"
    for wrong in ("a\nb", "-a", ""):
        assert code(register(world, made, wrong)) == (422, "invalid_field")
    assert code(register(world, made, "a", labels={"": "x"})) == (422, "invalid_field")
    assert register(world, made, "a", gpu_info=info | {"vram_gb": 80}).status_code == 200


def test_the_list_comes_in_pages(world: AccountWorld) -> None:
    for name in "abc":
        make(world, name)
    answer = world.ask("GET", f"{WORKERS}?limit=2&offset=1", by="admin")
    assert [worker["name"] for worker in answer.json()["workers"]] == ["b", "c"]
    assert (answer.json()["total"], answer.headers["X-Total-Count"]) == (3, "3")


def test_a_stream_brings_what_a_poll_does(world: AccountWorld) -> None:
    made = make(world, "a")
    path = register(world, made, "a").json()["sse_url"]

    async def run() -> None:
        listener = Listener(world, path, {"X-Worker-Token": made["token"]}, kind="http", peer="10.0.0.1")
        assert await listener.status() == 200
        await listener.first(frame("ping"))
        assert (await asyncio.to_thread(status_of, world, made)) == "idle"
        world.core.store.workers.change(made["worker_id"], draining=True)
        world.core.fleet.told_anew(made["worker_id"])
        await listener.first(frame("drain"))
        world.core.fleet.forget(made["worker_id"])
        await listener.first(frame("shutdown"))
        await asyncio.wait_for(listener.task, 5)

    world.loop.run(run())


def test_what_is_sent_to_a_worker_does_not_show_that_it_lives(world: AccountWorld) -> None:
    """A machine that lost its net keeps its stream open for a quarter of an hour, as far as this side can see."""
    now = [1000.0]
    fleet = Fleet(world.core.store, WorkerTimers(), clock=lambda: now[0])
    world.core = world.app.state.core = replace(world.core, fleet=fleet)
    made = make(world, "a")
    path = register(world, made, "a").json()["sse_url"]

    async def run() -> None:
        listener = Listener(world, path, {"X-Worker-Token": made["token"]}, kind="http", peer="10.0.0.1")
        await listener.first(frame("ping"))
        now[0] += fleet.timers.lease_s
        num_sent = len(listener.sent)
        fleet.wake(made["worker_id"])
        await listener.first(lambda message: len(listener.sent) > num_sent)
        assert (await asyncio.to_thread(status_of, world, made)) == "offline"
        await listener.leave()

    world.loop.run(run())


def test_a_new_token_ends_what_the_old_one_opened(world: AccountWorld) -> None:
    made = make(world, "a")
    path = register(world, made, "a").json()["sse_url"]
    poll_path = f"/api/workers/queue?worker_id={made['worker_id']}&wait=20"
    token = {"X-Worker-Token": made["token"]}

    async def run() -> None:
        held = Listener(world, poll_path, token, kind="http", peer="10.0.0.1")
        while not world.core.fleet.bell.is_heard(made["worker_id"]):
            await asyncio.sleep(0)
        stream = Listener(world, path, token, kind="http", peer="10.0.0.1")
        await stream.first(frame("ping"))
        key = {"X-API-Key": world.keys["admin"]}
        transport = httpx2.ASGITransport(app=world.app, client=("10.9.9.9", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.post(f"{WORKERS}/{made['worker_id']}/token", headers=key)
        assert await held.status() == 401
        await asyncio.wait_for(stream.task, 5)

    world.loop.run(run())


def frame(kind: str) -> Callable[[dict[str, Any]], bool]:
    """Of a stream, with an event of that kind."""
    return lambda message: f"event: {kind}\n".encode() in message.get("body", b"")


def status_of(world: AccountWorld, made: dict[str, Any]) -> str:
    worker = world.core.store.workers.get(made["worker_id"])
    assert worker is not None
    return world.core.fleet.status(worker)


def test_a_poll_is_answered_at_once(world: AccountWorld) -> None:
    made = connect(world, "a")

    async def drained_meanwhile() -> list[dict[str, Any]]:
        transport = httpx2.ASGITransport(app=world.app, client=("10.9.9.9", 1))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            path = f"/api/workers/queue?worker_id={made['worker_id']}&wait=20"
            waiting = asyncio.create_task(client.get(path, headers={"X-Worker-Token": made["token"]}))
            while not world.core.fleet.bell.is_heard(made["worker_id"]):
                await asyncio.sleep(0)
            key = {"X-API-Key": world.keys["admin"]}
            await client.post(f"{WORKERS}/{made['worker_id']}/drain", headers=key)
            return (await asyncio.wait_for(waiting, 10)).json()["messages"]

    assert world.loop.run(drained_meanwhile()) == [{"type": "drain"}]
    assert listed(world)["a"]["status"] == "draining"
    assert poll(world, made) == [], "it was told"
    world.ask("POST", f"{WORKERS}/{made['worker_id']}/undrain", by="admin")
    assert listed(world)["a"]["status"] == "idle"
    as_worker(world, made, "POST", "/api/workers/disconnect", json={"worker_id": made["worker_id"]})
    assert listed(world)["a"]["status"] == "offline"
    assert world.ask("GET", f"{WORKERS}?status_filter=idle", by="admin").json() == {"workers": [], "total": 0}


def test_a_job_goes_to_a_worker_and_is_told_until_it_is_taken(world: AccountWorld) -> None:
    made = connect(world, "a", count=2)
    job_id = give_job(world, num_devices=2)
    messages = [poll(world, made) for _ in range(2)]
    assert messages[0] == messages[1], "delivered again until the lease is taken"
    [message] = messages[0]
    assert (message["type"], message["job_id"], message["epoch"], message["attempt"]) == ("job_submit", job_id, 1, 1)
    token = {"X-Upload-Token": message["upload_token"]}
    acked = [
        world.ask("POST", f"/api/workers/job/{job_id}/ack", headers=token, json={"epoch": 1, "accepted": True}).json()
        for _ in range(2)
    ]
    assert [answer["success"] for answer in acked] == [True, True], "a lost answer is asked for again"
    assert poll(world, made) == [] and listed(world)["a"]["current_job_id"] == job_id
    answer = register(world, made, "a", leases=[{"job_id": job_id, "epoch": 1}]).json()
    assert answer["leases"][0]["verdict"] == "continue"
    job = world.ask("GET", f"/api/jobs/{job_id}", by="admin").json()["job"]
    assert (job["worker_id"], job["provider"], job["allocated_gpus"]) == (made["worker_id"], "worker", [0, 1])
    stats = world.ask("GET", "/api/queue/stats", by="admin").json()
    assert stats["workers"]["total_workers"] == 1 and stats["local"]["allocated_gpus"] == []
    assert code(world.ask("DELETE", f"{WORKERS}/{made['worker_id']}", by="admin")) == (409, "job_not_terminal")
    assert world.ask("DELETE", f"{WORKERS}/{made['worker_id']}?force=true", by="admin").status_code == 200
    world.core.supervisor.tick()
    assert world.core.job(job_id).status is JobStatus.LOST, "of one attempt"


def test_a_refused_job_waits_again_as_the_same_attempt(world: AccountWorld) -> None:
    made = connect(world, "a")
    job_id = give_job(world)
    [message] = poll(world, made)
    token = {"X-Upload-Token": message["upload_token"]}
    refusal = {"epoch": 1, "accepted": False, "reason": "no room on the disk"}
    assert world.ask("POST", f"/api/workers/job/{job_id}/ack", headers=token, json=refusal).status_code == 200
    world.core.supervisor.tick()
    job = world.core.job(job_id)
    assert (job.status, job.attempt) == (JobStatus.QUEUED, 1) and "no room on the disk" in (job.status_reason or "")
    assert world.core.placement.waits()[job_id].reason_code == "workers_busy", "it rests"
    assert world.core.store.jobs.leases() == {}
    assert code(world.ask("POST", f"/api/workers/job/{job_id}/ack", headers=token, json=refusal)) == (
        409,
        "stale_lease",
    )


def test_waits_for_workers_say_what_is_missing(world: AccountWorld) -> None:
    connect(world, "a", count=2, labels={"gpu": "a100-80"})
    label, count = give_job(world, "x", worker_labels={"gpu": "h100*"}), give_job(world, "y", num_devices=4)
    waits = world.core.placement.waits()
    assert (waits[label].reason_code, waits[count].reason_code) == ("no_matching_worker", "no_matching_worker")
    assert waits[label].reason == "Needs a worker with gpu=h100*; none of 1 connected is one: gpu=h100* matches nobody."
    assert (
        waits[count].reason == "Needs a worker with 4 devices; none of 1 connected is one: the largest has 2 device(s)."
    )
    fits = give_job(world, "z", worker_labels={"gpu": "a100*"})
    assert world.core.job(fits).status is JobStatus.STARTING
    late = give_job(world, "late")
    assert world.core.placement.waits()[late].reason == "Needs a worker: a is busy."
