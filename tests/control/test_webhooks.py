"""Webhooks of real jobs under a real server, and of a run in the foreground."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from control_world import FAKE_TRAINER, SOURCE, ServerProcess, free_port, until
from receiver import Post, Receiver

from simpletuner.jobs.foreground import ForegroundOutbox


def hooks(*receivers: Receiver | str, **more: Any) -> str:
    """As a form writes them."""
    urls = [each if isinstance(each, str) else each.url for each in receivers]
    return json.dumps([{"webhook_type": "raw", "callback_url": url, "log_level": "info"} | more for url in urls])


def indices(posts: list[Post]) -> list[int]:
    return [post.body["index"] for post in posts]


def has_end(receiver: Receiver) -> bool:
    return any(post.body["type"] == "job.status" and post.body["data"]["to"] == "completed" for post in receiver.taken)


def test_every_receiver_gets_every_event_in_order(server: ServerProcess) -> None:
    """One takes all, one fails twice, one refuses connections until later, one hangs; training notices none of it."""
    late_port = free_port()
    with closing(Receiver()) as good, closing(Receiver(500, 503)) as flaky, closing(Receiver(hangs=True)) as hanging:
        late = f"http://127.0.0.1:{late_port}/hook"
        hook = hooks(good, flaky, late, hanging)
        job_id = server.start_job(max_train_steps=40, webhook_config=hook)["job_id"]
        server.wait_status(job_id, "completed")
        until(lambda: has_end(good))
        assert hanging.posts == []
        until(lambda: has_end(flaky))
        with closing(Receiver(port=late_port)) as found:
            until(lambda: has_end(found), within_s=30)
            events = server.events(job_id=job_id)
            for receiver in (good, flaky, found):
                assert indices(receiver.taken) == [event["index"] for event in events]
            assert [post.body for post in good.taken] == events
        waiting = server.http.get(
            "/api/webhooks/deliveries", params={"job_id": job_id, "status": "pending", "limit": 5}
        )
        assert waiting.headers["X-Total-Count"] == str(len(events))
        row = waiting.json()["deliveries"][0]
        assert row.keys() == {
            "id", "job_id", "event_index", "url", "status", "attempts", "last_status", "last_error", "next_at",
        }  # fmt: skip
        assert {each["url"] for each in waiting.json()["deliveries"]} == {hanging.url}
        begin = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begin < 30, "a posting that hangs takes longer"


def test_a_server_that_is_killed_again_and_again_loses_nothing(server: ServerProcess) -> None:
    rng = random.Random(7)
    with closing(Receiver(*[500, 204, 204] * 5)) as receiver:
        job_id = server.start_job(max_train_steps=250, webhook_config=hooks(receiver))["job_id"]
        server.wait_status(job_id, "running")
        for _ in range(3):
            time.sleep(rng.uniform(0.05, 0.8))
            server.kill()
            server.start()
        server.wait_status(job_id, "completed")
        until(lambda: has_end(receiver))
        events = server.events(job_id=job_id)
        got = indices(receiver.taken)
        assert list(dict.fromkeys(got)) == [event["index"] for event in events]
        # At least once; twice only what was on its way at a death.
        assert len(got) - len(events) <= 3
        ids: dict[int, set[str]] = {}
        for post in receiver.taken:
            ids.setdefault(post.body["index"], set()).add(post.headers["X-SimpleTuner-Delivery"])
        assert all(len(each) == 1 for each in ids.values())


def test_what_could_not_be_delivered_waits_for_the_next_server(server: ServerProcess) -> None:
    port = free_port()
    job_id = server.start_job(max_train_steps=5, webhook_config=hooks(f"http://127.0.0.1:{port}/"))["job_id"]
    server.wait_status(job_id, "completed")
    server.kill()
    with closing(Receiver(port=port)) as receiver:
        server.start()
        until(lambda: has_end(receiver))
        assert indices(receiver.taken) == [event["index"] for event in server.events(job_id=job_id)]


def test_the_interval_holds_progress_back(server: ServerProcess) -> None:
    with closing(Receiver()) as receiver:
        job_id = server.start_job(max_train_steps=100, webhook_config=hooks(receiver), webhook_reporting_interval=3600)[
            "job_id"
        ]
        server.wait_status(job_id, "completed")
        until(lambda: has_end(receiver))
        steps = [
            post.body["progress"]["current"] for post in receiver.taken if post.body["type"] == "training.progress"
        ]
        assert steps == [1, 100]
        others = [event for event in server.events(job_id=job_id) if event["type"] != "training.progress"]
        assert len(receiver.taken) == 2 + len(others)


def test_secrets_are_shown_nowhere(server: ServerProcess) -> None:
    with closing(Receiver()) as receiver:
        server.http.post(
            "/api/configs/environments", json={"name": "e", "model_family": "pixart_sigma", "model_type": "full"}
        ).raise_for_status()
        hook = hooks(receiver, auth_token="hush-1", secret="hush-2")
        options = server.options(max_train_steps=3, webhook_config=hook)
        answer = server.http.post("/api/training/start", params={"environment": "e"}, json=options)
        job_id = answer.json()["job_id"]
        server.wait_status(job_id, "completed")
        until(lambda: has_end(receiver))
        stored = server.workspace / "config/e/config.json"
        assert json.loads(stored.read_text())["--webhook_config"][0]["secret"] == "hush-2"
        config = server.get("/api/configs/e")["config"]
        assert config["--webhook_config"][0]["auth_token"] == "***"
        put = server.http.put("/api/configs/e", json={"config": config | {"--seed": 5}})
        assert (put.status_code, put.json()["validation"]["errors"]) == (200, [])
        assert json.loads(stored.read_text())["--webhook_config"][0]["auth_token"] == "hush-1"
        validated = server.http.post(
            "/api/training/validate", params={"environment": "e"}, json={}, headers={"Accept": "application/json"}
        )
        shown = [
            server.http.get(path).text
            for path in (
                "/api/configs/e",
                "/api/configs/e/export",
                f"/api/jobs/{job_id}/config",
                f"/api/training/status?job_id={job_id}",
                "/api/training/events",
                "/api/webhooks/deliveries",
            )
        ]
        log = (server.workspace / "server.log").read_text()
        assert "hush-" not in "".join([answer.text, put.text, validated.text, log, *shown])
        assert '"***"' in validated.text


@pytest.mark.parametrize(
    ("hook", "pointer"),
    [
        ('[{"webhook_type": "raw"', "/--webhook_config"),
        ('[{"callback_url": "http://h/", "log_levl": "info"}]', "/--webhook_config/0/log_levl"),
    ],
)
def test_a_bad_shape_starts_nothing(shared_server: ServerProcess, hook: str, pointer: str) -> None:
    for path in ("start", "validate"):
        answer = shared_server.http.post(
            f"/api/training/{path}",
            params={"environment": "-"},
            data=shared_server.options(webhook_config=hook),
            headers={"Accept": "application/json"},
        )
        assert (answer.status_code, [each["pointer"] for each in answer.json()["errors"]]) == (422, [pointer])


def test_an_endpoint_is_tried_on_request(shared_server: ServerProcess) -> None:
    with closing(Receiver(204, 403)) as receiver:

        def ask(**hook: Any) -> Any:
            return shared_server.http.post("/api/webhooks/test", json=hook)

        assert ask(callback_url=receiver.url).json() == {"delivered": True, "status": 204, "error": None}
        assert receiver.posts[0].body["type"] == "notification"
        assert ask(callback_url=receiver.url).json()["status"] == 403
        own = ask(callback_url=f"{shared_server.url}/api/system/shutdown").json()
        assert (own["delivered"], "own port" in own["error"]) == (False, True)
        bad = ask(callback_url="http://169.254.169.254/")
        assert (bad.status_code, bad.json()["errors"][0]["pointer"]) == (422, "/callback_url")


def test_a_delivery_is_sent_again_on_request(shared_server: ServerProcess) -> None:
    with closing(Receiver()) as receiver:
        job_id = shared_server.start_job(max_train_steps=2, webhook_config=hooks(receiver, events=["training.status"]))[
            "job_id"
        ]
        shared_server.wait_status(job_id, "completed")
        until(lambda: len(receiver.taken) == 2)
        rows = until(
            lambda: shared_server.get(f"/api/webhooks/deliveries?job_id={job_id}&status=delivered")["deliveries"]
        )
        again = shared_server.http.post(f"/api/webhooks/deliveries/{rows[-1]['id']}/redeliver")
        assert (again.status_code, again.json()["status"]) == (200, "pending")
        until(lambda: len(receiver.taken) == 3)
        assert receiver.taken[2].content == receiver.taken[0].content
    assert shared_server.http.post("/api/webhooks/deliveries/none/redeliver").status_code == 404


def test_stored_endpoints(server: ServerProcess) -> None:
    base = "/api/configs/webhooks"
    with closing(Receiver()) as receiver:
        hook = {"callback_url": receiver.url, "auth_token": "hush"}
        made = server.http.post(base, json={"name": "mine", "config": [hook]})
        assert (made.status_code, made.json()["config"][0]["auth_token"]) == (201, "***")
        assert server.http.post(base, json={"name": "mine", "config": hook}).status_code == 409
        for bad in ("../x", ".hidden"):
            assert server.http.post(base, json={"name": bad, "config": hook}).status_code == 422
        wrong = server.http.post(base, json={"name": "other", "config": [hook | {"secrte": "x"}]})
        assert (wrong.status_code, wrong.json()["errors"][0]["pointer"]) == (422, "/config/0/secrte")
        file = server.workspace / "config/webhooks/mine.json"
        shown = server.get(f"{base}/mine")["config"]
        put = server.http.put(f"{base}/mine", json={"config": [shown[0] | {"log_level": "error"}]})
        assert put.status_code == 200
        assert json.loads(file.read_text()) == [hook | {"log_level": "error"}]
        tried = server.http.post(f"{base}/mine/test").json()
        assert (tried["delivered"], receiver.posts[0].headers["X-API-Key"]) == (True, "hush")
        assert [each["name"] for each in server.get(base)["webhooks"]] == ["mine"]
        assert [each["name"] for each in server.get("/api/configs?config_type=webhook")["configs"]] == ["mine"]
        # A file of this name must not make the folder an environment.
        server.http.post(base, json={"name": "config", "config": hook}).raise_for_status()
        assert server.get("/api/configs")["configs"] == []
        server.http.put(f"{base}/mine", json={"config": [hook]}).raise_for_status()
        job_id = server.start_job(max_train_steps=2, webhook_config="webhooks/mine.json")["job_id"]
        server.wait_status(job_id, "completed")
        until(lambda: has_end(receiver))
        assert server.http.delete(f"{base}/mine").status_code == 200
        assert not file.exists()
        for method, path in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("POST", "/test")):
            body = {"config": hook} if method == "PUT" else None
            assert server.http.request(method, f"{base}/mine{path}", json=body).status_code == 404


def test_private_targets_can_be_switched_off(tmp_path: Path) -> None:
    forbidding = ServerProcess(tmp_path, SIMPLETUNER_WEBHOOK_ALLOW_PRIVATE="false")
    with closing(forbidding) as server, closing(Receiver()) as receiver:
        job_id = server.start_job(max_train_steps=2, webhook_config=hooks(receiver))["job_id"]
        server.wait_status(job_id, "completed")
        dead = until(lambda: server.get("/api/webhooks/deliveries?status=dead")["deliveries"])
        assert "private" in dead[0]["last_error"]
        assert receiver.posts == []


def run_in_foreground(workspace: Path, server: ServerProcess, hook: str, **options: Any) -> subprocess.Popen[str]:
    words = [f"{name}={value}" for name, value in server.options(webhook_config=hook, **options).items()]
    environ = dict(os.environ) | {"PYTHONPATH": str(SOURCE), "SIMPLETUNER_TRAINER": str(FAKE_TRAINER)}
    command = [sys.executable, "-m", "simpletuner.cli.main", "train", "--json", *words]
    return subprocess.Popen(
        command, env=environ, cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_foreground_run_posts_by_itself(server: ServerProcess) -> None:
    """The server beside it stays out of it."""
    with closing(Receiver(500)) as receiver:
        run = run_in_foreground(server.workspace, server, hooks(receiver), max_train_steps=30)
        said, complaints = run.communicate(timeout=60)
        assert run.returncode == 0
        assert f"Webhook {receiver.url} did not take event 1" in complaints
        assert "not delivered yet" not in complaints
        lines = [json.loads(line) for line in said.splitlines()]
        posted = [post.body for post in receiver.taken]
        assert [(event["type"], event["timestamp"]) for event in posted] == [
            (event["type"], event["timestamp"]) for event in lines
        ]
        assert "completed" in [event["data"].get("status") for event in posted]
        assert server.events() == []


@pytest.mark.parametrize("served", [False, True])
def test_what_a_foreground_run_leaves_is_posted_by_the_server(server: ServerProcess, served: bool) -> None:
    """Its command is killed, its run goes on to the end; the server runs beside it, or is started later."""
    port = free_port()
    if not served:
        server.kill()
    run = run_in_foreground(server.workspace, server, hooks(f"http://127.0.0.1:{port}/"), max_train_steps=100)
    root = server.workspace / ".simpletuner" / "foreground"
    journal = until(lambda: next(root.glob("*/events.jsonl"), None), within_s=30)
    assert journal is not None
    until(lambda: b"training.progress" in journal.read_bytes())
    run.send_signal(signal.SIGKILL)
    run.communicate()
    until((journal.parent / "exit.json").exists, within_s=30)
    with closing(Receiver(port=port)) as receiver:
        if not served:
            server.start()
        until(lambda: "completed" in [post.body["data"].get("status") for post in receiver.taken])
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        until(lambda: len(receiver.taken) == len(lines))
        assert [post.body["timestamp"] for post in receiver.taken] == [line["timestamp"] for line in lines]
    with closing(ForegroundOutbox.open(root)) as outbox:
        until(lambda: outbox.num_waiting(journal.parent.name) == 0)


def test_a_foreground_run_says_what_it_could_not_post(server: ServerProcess) -> None:
    run = run_in_foreground(server.workspace, server, hooks(f"http://127.0.0.1:{free_port()}/"), max_train_steps=3)
    _, complaints = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "webhook posts are not delivered yet" in complaints
