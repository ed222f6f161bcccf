"""Validate, start, stop: the way through a run as a client sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from control_world import ServerProcess, until

HTML = {"Accept": "text/html"}


def problem_codes(body: dict[str, Any]) -> set[str]:
    return {item["code"] for item in body["errors"]}


def test_validate_negotiates_and_writes_nothing(shared_server: ServerProcess) -> None:
    http = shared_server.http
    form = {"__active_tab__": "model"} | {name: str(value) for name, value in shared_server.options().items()}
    html = http.post("/api/training/validate", data=form)
    assert html.status_code == 200, html.text
    assert "Configuration Valid" in html.text
    assert "Validation Failed" not in html.text
    answer = http.post("/api/training/validate", json=shared_server.options(), headers={"Accept": "application/json"})
    assert answer.json()["valid"]
    assert answer.json()["provenance"]["--max_train_steps"] == "request"
    wrong = shared_server.options(learning_rat=1) | {"--max_train_steps": 0, "--num_train_epochs": 0}
    failed = http.post("/api/training/validate", json=wrong, headers={"Accept": "application/json"})
    assert failed.status_code == 422
    assert {"unknown_field", "no_run_length"} <= problem_codes(failed.json())
    assert failed.json()["code"] == "invalid_config"
    shown = http.post("/api/training/validate", json=wrong)
    assert 'data-code="no_run_length"' in shown.text
    assert "Did you mean --learning_rate?" in shown.text
    assert shared_server.get("/api/configs/active")["name"] is None
    evil = http.post("/api/training/validate", json={"--<script>": 1})
    assert "<script>" not in evil.text


def test_a_run_from_start_to_stop(server: ServerProcess) -> None:
    first = server.start_job(validation_prompt="test shot of <token>")
    assert first["status"] == "running"
    assert first["allocated_gpus"] == [0]
    assert first["config_name"] == f"adhoc-{first['job_id']}"
    written = json.loads((server.workspace / first["config_written"]).read_text())
    assert written["--validation_prompt"] == "test shot of <token>"
    assert server.get("/api/configs/active")["name"] == first["config_name"]
    job_id = first["job_id"]
    server.wait_status(job_id, "running")
    status = until(lambda: (s := server.get("/api/training/status"))["progress"] and s)
    assert (status["status"], status["job_id"]) == ("running", job_id)
    assert status["config"]["--max_train_steps"] == 100_000
    second = server.start_job(output_dir="output/second")
    assert (second["status"], second["queue_position"]) == ("queued", 1)
    assert second["reason"]
    refused = server.http.post("/api/training/start?no_wait=true", json=server.options(output_dir="output/third"))
    assert refused.status_code == 409
    assert refused.json()["code"] == "gpus_unavailable"
    asked = server.http.post("/api/training/validation/run").json()
    done = until(lambda: server.events(types="training.validation"))
    assert done[0]["request_id"] == asked["request_id"]
    stopped = server.http.post("/api/training/stop")
    assert stopped.status_code == 202
    assert stopped.json()["status"] == "stopping"
    server.wait_status(job_id, "stopped")
    server.wait_status(second["job_id"], "running")
    cancelled = server.http.post("/api/training/cancel", files={"job_id": (None, second["job_id"])})
    assert cancelled.status_code == 202, cancelled.text
    server.wait_status(second["job_id"], "cancelled")
    again = server.http.post("/api/training/cancel", data={"job_id": second["job_id"]})
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")
    assert server.http.post("/api/training/stop").json()["code"] == "no_active_job"
    assert server.http.post("/api/training/cancel", json={"job_id": "nope"}).status_code == 404
    idle = server.get("/api/training/status")
    assert (idle["status"], idle["job_id"], idle["last_job"]["status"]) == ("idle", None, "cancelled")


def test_only_the_tab_and_no_environment_starts_nothing(shared_server: ServerProcess) -> None:
    answer = shared_server.http.post("/api/training/start?environment=-", data={"__active_tab__": "model"})
    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid_config"
    assert shared_server.get("/api/jobs")["total"] == 0 or answer.json()["errors"]


def test_the_same_key_is_one_job(server: ServerProcess) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = server.http.post("/api/training/start", json=server.options(), headers=headers)
    again = server.http.post("/api/training/start", json=server.options(), headers=headers)
    assert again.json() == first.json()
    assert again.headers["Idempotent-Replayed"] == "true"
    other = server.http.post("/api/training/start", json=server.options(seed=3), headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert server.get("/api/jobs")["total"] == 1


def test_a_run_of_a_stored_environment(server: ServerProcess) -> None:
    made = server.http.post(
        "/api/configs/environments", json={"name": "demo", "model_family": "pixart_sigma", "model_type": "full"}
    )
    assert made.status_code == 201, made.text
    assert server.http.post("/api/configs/environments", json={"name": "demo", "model_family": "x"}).status_code == 409
    assert made.json()["dataloader"]["path"] == "demo/multidatabackend.json"
    config = server.get("/api/configs/demo")["config"] | {
        "--max_train_steps": 50,
        "--learning_rate": 1e-05,
        "--data_backend_config": server.make_dataset(),
    }
    before = server.http.get("/api/configs/demo").headers["ETag"]
    put = server.http.put("/api/configs/demo", json={"config": config, "tags": ["a"], "name": "demo"})
    assert put.status_code == 200, put.text
    assert put.json()["validation"]["errors"] == []
    assert put.headers["ETag"] != before
    stale = server.http.put("/api/configs/demo", json={"config": config}, headers={"If-Match": before})
    assert (stale.status_code, stale.json()["code"]) == (412, "etag_mismatch")
    now = server.http.get("/api/configs/demo", headers={"If-None-Match": put.headers["ETag"]})
    assert now.status_code == 304
    assert server.http.post("/api/configs/demo/activate").json()["active"] == "demo"
    assert server.http.delete("/api/configs/demo").json()["code"] == "environment_active"
    answer = server.http.post("/api/training/start", data={"__active_tab__": "model", "--num_train_epochs": "0"})
    assert answer.status_code == 202, answer.text
    assert answer.json()["config_name"] == "demo"
    job = server.wait_status(answer.json()["job_id"], "completed")
    assert job["progress"]["step"] == 50
    assert server.get("/api/configs/demo")["config"]["--learning_rate"] == 1e-05
    exported = server.get("/api/configs/demo/export")
    imported = server.http.post("/api/configs/import", json={"data": exported, "name": "demo2"})
    assert imported.status_code == 201, imported.text
    again = server.get("/api/configs/demo2/export")
    assert (again["config"], again["dataloader"]) == (exported["config"], exported["dataloader"])
    assert server.get("/api/configs/")["count"] == 2
    assert server.http.post("/api/configs/demo2/rename", json={"new_name": "demo3"}).status_code == 200
    assert server.http.post("/api/configs/demo3/dataloader").status_code == 409
    assert server.http.post("/api/configs/demo3/dataloader?overwrite=true").json()["backup"]
    assert server.http.delete("/api/configs/demo3").status_code == 200
    assert server.get("/api/training/checkpoints")["total"] == 0


@pytest.mark.parametrize("path", ["start", "stop"])
def test_html_when_htmx_asks(shared_server: ServerProcess, path: str) -> None:
    answer = shared_server.http.post(f"/api/training/{path}", headers={"HX-Request": "true"})
    assert answer.status_code in {400, 422}
    assert answer.json()["request_id"]


def test_a_server_with_an_environment_runs_it_unasked_and_once(server: ServerProcess) -> None:
    http = server.http
    made = http.post("/api/configs/", json={"name": "once", "config": server.options()})
    assert made.status_code == 201, made.text
    assert server.stop() == 0
    heir = ServerProcess(server.workspace, environment="once")
    try:
        job = until(lambda: heir.get("/api/jobs")["jobs"])[0]
        assert job["config_name"] == "once"
        assert heir.get("/api/configs/active")["name"] == "once"
        heir.kill()
        heir.start()
        heir.wait_status(job["job_id"], "running")
        assert heir.get("/api/jobs")["total"] == 1
    finally:
        heir.close()


def test_what_cannot_be_written_to_a_file_is_refused(shared_server: ServerProcess) -> None:
    http, typed = shared_server.http, {"Content-Type": "application/json"}
    for body in (b'{"config": {"--seed": NaN}}', b'{"config": {"--tracker_run_name": "\\ud800"}}', b"[" * 5000):
        answer = http.put("/api/configs/none", content=body, headers=typed)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_field"), answer.text
        answer = http.post("/api/training/start", content=body, headers=typed)
        assert answer.status_code == 422, answer.text
    many = ",".join("a" for _ in range(2000))
    assert http.get("/api/training/events", params={"types": many}).status_code == 422


def test_the_lycoris_file_of_an_environment(shared_server: ServerProcess) -> None:
    http = shared_server.http
    body = {"name": "adapter", "model_family": "flux", "model_flavour": "nano", "model_type": "lora",
            "lora_type": "lycoris"}  # fmt: skip
    assert http.post("/api/configs/environments", json=body).status_code == 201
    read = http.get("/api/configs/adapter/lycoris")
    assert read.json()["content"]["algo"] == "lora" and read.json()["path"] == "adapter/lycoris_config.json"
    mine = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 8}
    put = http.put("/api/configs/adapter/lycoris", json={"config": mine}, headers={"If-Match": read.headers["ETag"]})
    assert put.status_code == 200, put.text
    stale = http.put("/api/configs/adapter/lycoris", json={"config": mine}, headers={"If-Match": read.headers["ETag"]})
    assert (stale.status_code, stale.json()["code"]) == (412, "etag_mismatch")
    wrong = http.put("/api/configs/adapter/lycoris", json={"config": {"algo": "lokrr", "factr": 2}})
    assert wrong.status_code == 422 and "Did you mean" in wrong.text
    assert {item["code"] for item in wrong.json()["errors"]} == {"unknown_algo", "unknown_lycoris_key"}
    assert http.get("/api/configs/adapter/lycoris").json()["content"] == mine
    exported = http.get("/api/configs/adapter/export").json()
    assert exported["lycoris"] == mine
    assert http.post("/api/configs/import", json={"data": exported, "name": "adapter2"}).status_code == 201
    assert http.get("/api/configs/adapter2/lycoris").json()["content"] == mine
    http.post("/api/configs/environments", json={"name": "plain", "model_family": "pixart_sigma"})
    assert http.get("/api/configs/plain/lycoris").status_code == 404
