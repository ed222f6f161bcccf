"""One history, three ways to read it, and none loses or repeats anything."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest
from control_world import ServerProcess, World
from websockets.sync.client import connect

from simpletuner.jobs import feed as feed_module
from simpletuner.jobs.event_view import find_artifact
from simpletuner.jobs.feed import Feed
from simpletuner.store.event_filter import EventFilter
from simpletuner.store.event_row import StoredEvent


def sse(stream: httpx2.Response) -> Iterator[dict[str, Any]]:
    """Each frame as its fields; comments under `comment`."""
    frame: dict[str, Any] = {}
    for line in stream.iter_lines():
        if not line:
            yield frame
            frame = {}
        elif line.startswith(":"):
            frame["comment"] = line
        else:
            name, _, value = line.partition(": ")
            frame[name] = json.loads(value) if name == "data" else value


def test_polling_sse_and_socket_agree(server: ServerProcess) -> None:
    job_id = server.start_job(max_train_steps=120)["job_id"]
    with (
        server.http.stream("GET", "/api/training/events/stream?since_index=0&types=training.*") as stream,
        connect(f"ws://localhost:{server.port}/api/events?since_index=0&types=training.*") as socket,
    ):
        frames = sse(stream)
        hello = next(frames)
        assert (hello["event"], hello["data"]["oldest_index"]) == ("hello", 1)
        assert "id" not in hello
        assert stream.headers["X-Accel-Buffering"] == "no"
        assert json.loads(socket.recv(timeout=5))["hello"]["next_index"] == 0
        streamed: list[dict[str, Any]] = []
        for frame in frames:
            assert int(frame["id"]) == frame["data"]["index"]
            streamed.append(frame["data"])
            if frame["data"]["data"].get("status") == "completed":
                break
        sent: list[dict[str, Any]] = []
        while len(sent) < len(streamed):
            message = json.loads(socket.recv(timeout=5))
            assert message["job_id"] == job_id
            sent.append(message["event"])
    server.wait_status(job_id, "completed")
    polled = [event for event in server.events(limit=7) if event["type"].startswith("training.")]
    assert streamed == sent == polled
    everything = server.events()
    assert [event["index"] for event in everything] == list(range(1, len(everything) + 1))
    assert len({event["id"] for event in everything}) == len(everything)
    with server.http.stream("GET", "/api/training/stream", headers={"Last-Event-ID": "5"}) as stream:
        frames = sse(stream)
        assert next(frames)["data"]["next_index"] == 6
        assert next(frames)["id"] == "6"
    assert server.get("/api/training/events?since_index=0&types=job.*&job_id=current")["job_id"] == job_id


def test_waiting_returns_at_the_first_match(server: ServerProcess) -> None:
    begin = time.monotonic()
    page = server.get("/api/training/events?wait=0.2&types=nothing")
    assert (page["events"], page["next_index"]) == ([], 1)
    assert time.monotonic() - begin >= 0.2
    job_id = server.start_job(max_train_steps=5)["job_id"]
    page = server.get("/api/training/events?wait=20&types=training.status")
    assert page["events"][0]["data"]["status"] == "running"
    server.wait_status(job_id, "completed")


def test_from_trainer_to_client_in_a_quarter_second(server: ServerProcess) -> None:
    job_id = server.start_job(max_train_steps=150)["job_id"]
    delays: list[float] = []
    with server.http.stream("GET", "/api/training/events/stream?types=training.progress") as stream:
        for frame in sse(stream):
            if frame["event"] == "training.progress":
                written = datetime.fromisoformat(frame["data"]["timestamp"])
                delays.append((datetime.now(UTC) - written).total_seconds())
                if frame["data"]["progress"]["current"] >= 150:
                    break
    server.wait_status(job_id, "completed")
    assert statistics.median(delays) < 0.25


def test_logs_and_config_of_a_job(server: ServerProcess) -> None:
    job_id = server.start_job(max_train_steps=3)["job_id"]
    with server.http.stream("GET", f"/api/jobs/{job_id}/logs/stream") as stream:
        frames = list(sse(stream))
    assert frames[0]["data"] == "trainer says hello"
    assert (frames[-1]["event"], frames[-1]["data"]["status"]) == ("done", "completed")
    page = server.get(f"/api/jobs/{job_id}/logs?tail=1")
    assert (page["logs"], page["eof"]) == ("trainer says hello\n", True)
    assert server.http.get(f"/api/jobs/{job_id}/logs?format=text").text == "trainer says hello\n"
    assert server.get(f"/api/jobs/{job_id}/logs?offset=8")["logs"] == "says hello\n"
    config = server.get(f"/api/jobs/{job_id}/config")
    assert config["config"]["--max_train_steps"] == 3
    assert config["provenance"]["--max_train_steps"]["layer"] == "request"
    assert server.get(f"/api/jobs/{job_id}/artifacts") == []
    artifact = server.folder(job_id).artifacts / "a.png"
    artifact.write_bytes(b"0123456789")
    part = server.http.get(f"/api/jobs/{job_id}/artifacts/a.png", headers={"Range": "bytes=2-4"})
    assert (part.status_code, part.content) == (206, b"234")
    (server.folder(job_id).artifacts / "link").symlink_to("/etc/passwd")
    for escape in ("%2E%2E%2Fspec.json", "link", ".."):
        assert find_artifact(server.folder(job_id).root, escape) is None
    assert server.http.delete(f"/api/jobs/{job_id}").json() == {"success": True}
    assert not server.folder(job_id).root.exists()
    assert server.http.get(f"/api/jobs/{job_id}").status_code == 404
    assert server.events()


def stored(index: int, body: str = "{}") -> StoredEvent:
    return StoredEvent(index=index, id=f"j:{index}", job_id="j", type="log", body=body)


def test_a_slow_listener_runs_over_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "QUEUE_EVENTS", 10)

    async def scenario() -> None:
        feed = Feed()
        with feed.subscribe(EventFilter()) as slow, feed.subscribe(EventFilter()) as quick:
            received: list[int] = []
            for index in range(1, 31):
                feed.publish([stored(index)])
                assert await quick.wait(1)
                received += [event.index for event in quick.take()]
            assert received == list(range(1, 31))
            assert not quick.overflowed
            assert slow.overflowed
            feed.close()
            assert quick.closed
        assert feed.num_listeners == 0

    asyncio.run(scenario())


def test_too_many_bytes_run_over_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "QUEUE_BYTES", 100)

    async def scenario() -> bool:
        feed = Feed()
        with feed.subscribe(EventFilter()) as slow:
            feed.publish([stored(index, "x" * 60) for index in (1, 2)])
            return slow.overflowed

    assert asyncio.run(scenario())


def test_a_wait_is_announced_once_until_it_changes(world: World) -> None:
    first = world.submit().job.job_id
    second = world.submit().job.job_id
    for _ in range(3):
        world.seen += world.supervisor.tick()
    waits = [event.as_dict() for event in world.seen if event.type == "job.waiting"]
    assert [(wait["job_id"], wait["data"]["position"]) for wait in waits] == [(second, 1)]
    assert waits[0]["data"]["reason_code"] == "job_limit"
    world.supervisor.request_end(second, "cancel")
    world.supervisor.request_end(first, "cancel")
