"""`simpletuner workers`: what it does at the server, and what the shell is told."""

from __future__ import annotations

import json

import pytest
from control_world import ServerProcess

import simpletuner
from simpletuner.cli.main import main


def test_workers_on_the_command_line(
    shared_server: ServerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIMPLETUNER_URL", shared_server.url)
    monkeypatch.delenv("SIMPLETUNER_API_KEY", raising=False)

    def run(*words: str, code: int = 0) -> str:
        assert main(["workers", *words]) == code
        return capsys.readouterr().out

    assert run("list") == ""
    made = json.loads(run("add", "box", "--label", "zone=a", "--json"))
    assert run("add", "box", code=1) == ""
    token = {"X-Worker-Token": made["token"]}
    info = {"name": "A100", "count": 2, "vram_gb": 80}
    told = {"name": "box", "gpu_info": info, "version": simpletuner.__version__}
    assert shared_server.http.post("/api/workers/register", headers=token, json=told).status_code == 200
    assert shared_server.get("/api/workers/queue", headers=token, params={"worker_id": made["worker_id"]})
    head, row = run("list").splitlines()
    assert head.split() == ["NAME", "STATUS", "DEVICES", "JOB", "LABELS", "ID"]
    assert row.split() == ["box", "idle", "2", "×", "A100", "-", "zone=a", made["worker_id"]]
    assert run("drain", "box") == "Worker box is draining.\n"
    assert run("undrain", made["worker_id"]) == "Worker box is idle.\n"
    assert run("list", "--status", "offline") == ""
    assert f"--orchestrator-url {shared_server.url} --worker-token wt_" in run("token", "box")
    assert shared_server.http.post("/api/workers/register", headers=token, json=told).status_code == 401
    assert run("remove", "box") == "Worker box is removed.\n"
    assert run("remove", "box", code=1) == "" and run("list") == ""
