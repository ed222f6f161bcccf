"""What every answer has in common, and how the process starts and ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from control_world import FAKE_TRAINER, SOURCE, ServerProcess, until, warm_servers
from warm import WarmProcess


def test_errors_have_one_shape(shared_server: ServerProcess) -> None:
    http = shared_server.http
    cases = [
        (http.get("/api/nope"), 404, "not_found"),
        (http.get("/api/jobs/nope"), 404, "unknown_job"),
        (http.put("/api/jobs"), 405, "method_not_allowed"),
        (http.get("/api/jobs?lmit=1"), 422, "unknown_field"),
        (http.get("/api/jobs?limit=0"), 422, "invalid_field"),
        (http.post("/api/training/stop", json={"job": 1}), 422, "unknown_field"),
        (http.post("/api/training/stop"), 400, "no_active_job"),
        (http.post("/api/configs/environments"), 422, "body_required"),
        (http.post("/api/configs/environments", json={"name": "a", "model_famly": 1}), 422, "invalid_field"),
        (http.post("/api/configs/environments", json={"name": "../x", "model_family": "sdxl"}), 422, "invalid_field"),
        (http.post("/api/training/start", content=b"{", headers={"Content-Type": "application/json"}), 422, None),
        (http.post("/api/training/start", content=b"x", headers={"Content-Type": "text/x"}), 415, None),
        (http.post("/api/training/start", content=b" " * (2**21 + 1)), 413, "body_too_large"),
        (http.get("/api/jobs/nope/artifacts/..%2F..%2Fspec.json"), 404, None),
    ]
    for answer, status, code in cases:
        body = answer.json()
        assert answer.status_code == status, body
        assert code is None or body["code"] == code, body
        assert {"detail", "code", "request_id"} <= body.keys() <= {"detail", "code", "request_id", "hint", "errors"}
        assert body["request_id"] == answer.headers["X-Request-ID"]
        for item in body.get("errors", []):
            assert item.keys() == {"pointer", "option", "code", "message", "hint"}
    assert http.get("/api/jobs?lmit=1").json()["hint"] == "Did you mean limit?"
    assert http.get("/api/jobs?_=1").status_code == 200


def test_a_streamed_body_is_counted_too(shared_server: ServerProcess) -> None:
    chunks = (b" " * 65536 for _ in range(40))
    answer = shared_server.http.post("/api/training/start", content=chunks)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_a_slash_at_the_end_changes_nothing(shared_server: ServerProcess) -> None:
    for path in ("/health/", "/api/jobs/", "/api/cloud/jobs/", "/api/configs/"):
        assert shared_server.http.get(path).status_code == 200


def test_request_ids_are_kept_or_made(shared_server: ServerProcess) -> None:
    kept = shared_server.http.get("/health", headers={"X-Request-ID": "abc.1"})
    assert kept.headers["X-Request-ID"] == "abc.1"
    made = shared_server.http.get("/health", headers={"X-Request-ID": "a b\u00ff".encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{16}", made.headers["X-Request-ID"])


def test_docs_need_no_network(shared_server: ServerProcess) -> None:
    for path in ("/docs", "/redoc"):
        page = shared_server.http.get(path)
        assert "text/html" in page.headers["content-type"]
        nonce = re.search(r"'nonce-([^']+)'", page.headers["Content-Security-Policy"])
        assert nonce is not None
        assert "https://" not in page.text
        assert page.text.count(f'nonce="{nonce[1]}"') == page.text.count("<script")
        for asset in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
            assert shared_server.http.get(asset).status_code == 200


def test_openapi_says_what_the_contract_asks(shared_server: ServerProcess) -> None:
    document = shared_server.get("/openapi.json")
    assert document["info"]["title"] == "SimpleTuner"
    operations = [each for path in document["paths"].values() for each in path.values()]
    ids = [each["operationId"] for each in operations]
    assert len(ids) == len(set(ids))
    assert all(each["tags"] for each in operations)
    assert "/api/cloud/jobs" not in document["paths"]
    assert "application/json" in document["paths"]["/api/training/start"]["post"]["requestBody"]["content"]


def test_status_splits_the_devices(shared_server: ServerProcess) -> None:
    status = shared_server.get("/api/system/status?include_allocation=true")
    allocation = status["gpu_allocation"]
    assert allocation.keys() == {"allocated_gpus", "available_gpus", "running_local_jobs", "devices"}
    assert sorted(allocation["allocated_gpus"] + allocation["available_gpus"]) == [0]
    assert "gpu_allocation" not in shared_server.get("/api/system/status")


def test_it_is_up_in_two_seconds_and_ends_well(tmp_path: Path) -> None:
    """Two seconds where the framework alone takes 0.4: a busy machine slows both.

    On a free core that is the time to the first answer.
    """
    framework = "import time, fastapi, uvicorn; print(time.process_time())"
    told = subprocess.check_output([sys.executable, "-c", framework], text=True)
    with closing(ServerProcess(tmp_path, is_cold=True)) as server:
        spent = psutil.Process(server.process.pid).cpu_times()
        assert spent.user + spent.system < 2 * max(1.0, float(told) / 0.4)
        assert (server.workspace / "config" / "webhooks.json").exists()
        assert (server.workspace / ".simpletuner").stat().st_mode & 0o777 == 0o700
        assert server.stop() == 0


def test_what_it_cannot_have_is_an_exit_code(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    assert run_serve(other, server.port) == 69
    assert run_serve(server.workspace, 1) == 73
    assert run_serve(other, 0, SIMPLETUNER_DEVICES="many") == 64
    assert run_serve(other, 0, SIMPLETUNER_STATE_DIR="/proc/nope") == 73
    assert run_serve(other, 0, environment="missing") == 64


def run_serve(workspace: Path, port: int, environment: str = "", **environ: str) -> int:
    words = ["serve", str(workspace), str(port), *([environment] if environment else [])]
    with tempfile.TemporaryFile() as output:
        place: dict[str, Any] = {"env": os.environ | environ, "cwd": workspace, "stdout": output, "stderr": output}
        return WarmProcess(warm_servers().address, words, **place).wait(60)


def test_shutdown_keeps_jobs_and_ends_streams(server: ServerProcess) -> None:
    job_id = server.start_job()["job_id"]
    server.wait_status(job_id, "running")
    with server.http.stream("GET", "/api/training/events/stream") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "retry: 3000"
        assert server.http.post("/api/system/shutdown").status_code == 202
        assert list(lines)
    assert server.process.wait(timeout=10) == 0
    assert server.folder(job_id).is_locked()
    server.start()
    assert server.get(f"/api/jobs/{job_id}")["job"]["is_active"]
    assert server.http.post("/api/system/shutdown?jobs=cancel").status_code == 202
    until(lambda: not server.folder(job_id).is_locked())


def test_torch_is_never_imported() -> None:
    code = "import sys, simpletuner.server.run, simpletuner.jobs.runner; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", f"import json; {code}"]
    answer = subprocess.run(
        command, env=dict(os.environ) | {"PYTHONPATH": str(SOURCE)}, capture_output=True, check=True
    )
    modules = set(json.loads(answer.stdout))
    assert not modules & {"torch", "diffusers", "transformers", "numpy"}
    assert not any(
        name.startswith(("simpletuner.train", "simpletuner.data", "simpletuner.diffusion")) for name in modules
    )


def test_routes_golden(shared_server: ServerProcess) -> None:
    document = shared_server.get("/openapi.json")
    rows = [
        f"{method.upper():6} {path} {each['operationId']} [{', '.join(each['tags'])}]"
        for path, operations in sorted(document["paths"].items())
        for method, each in sorted(operations.items())
    ]
    golden = FAKE_TRAINER.with_name("routes.golden.txt")
    assert "\n".join(rows) + "\n" == golden.read_text(), "a changed route is a decision: write the golden file anew"
