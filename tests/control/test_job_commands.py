"""`simpletuner jobs` and `devices`: what they do at a server, and what the shell is told. api.md §6."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from control_world import SOURCE, ServerProcess, until

from simpletuner.cli.job_submit import exit_of_job
from simpletuner.cli.main import main

LONG = "max_train_steps=1000000"


class Shell:
    """Runs commands in this process."""

    def __init__(self, server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
        self.server, self._capsys = server, capsys
        self.out = self.err = ""

    def run(self, *words: str) -> int:
        self._capsys.readouterr()
        code = main(words)
        self.out, self.err = self._capsys.readouterr()
        return code

    def json(self, *words: str, code: int = 0) -> Any:
        assert self.run(*words, "--json") == code, self.err
        return [json.loads(line) for line in self.out.splitlines()][-1]

    def submit(self, *words: str) -> str:
        return self.json("jobs", "submit", "queued", *words)["job_id"]


@pytest.fixture(scope="module")
def environment(shared_server: ServerProcess) -> ServerProcess:
    """That is stored there."""
    options = shared_server.options(output_dir="output/queued", max_train_steps=3)
    answer = shared_server.http.post("/api/configs", json={"name": "queued", "config": options})
    assert answer.status_code == 201, answer.text
    return shared_server


@pytest.fixture
def shell(
    environment: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(environment.workspace / "no-keys"))
    monkeypatch.setenv("SIMPLETUNER_URL", environment.url)
    monkeypatch.delenv("SIMPLETUNER_API_KEY", raising=False)
    built = Shell(environment, capsys)
    yield built
    for job in environment.get("/api/jobs")["jobs"]:
        if not job["is_terminal"]:
            environment.http.post(f"/api/jobs/{job['job_id']}/cancel")
            environment.wait_status(job["job_id"], "cancelled", "completed")


def test_a_dry_run_says_what_submit_does(shell: Shell) -> None:
    number = len(shell.server.get("/api/jobs?limit=500")["jobs"])
    assert shell.run("jobs", "submit", "queued", "-n") == 0
    assert [line.split(":")[0] for line in shell.out.splitlines()] == [
        "Job ID", "Status", "GPUs", "Worker", "Queue Position", "Reason",
    ]  # fmt: skip
    assert "would be running" in shell.out
    assert len(shell.server.get("/api/jobs?limit=500")["jobs"]) == number
    first = shell.submit("--set", LONG)
    foreseen = shell.json("jobs", "submit", "queued", "--dry-run", "--any-gpu", "-t", "local", code=3)
    assert (foreseen["status"], foreseen["queue_position"], first in foreseen["reason"]) == ("queued", 1, True)
    for words in ((), ("-n",)):
        assert shell.json("jobs", "submit", "queued", "--no-wait", *words, code=4)["status"] == "rejected"
    assert shell.run("jobs", "submit", "queued", "--no-wait") == 4 and first in shell.out
    second = shell.json("jobs", "submit", "queued", "--priority", "50", "--max-attempts", "2")
    assert second["reason"] == foreseen["reason"]
    assert shell.server.get(f"/api/jobs/{second['job_id']}")["job"]["max_attempts"] == 2
    assert shell.run("jobs", "status") == 0 and first in shell.out
    assert shell.run("devices") == 0 and first in shell.out
    assert shell.run("jobs", "list", "--status", "queued") == 0
    assert second["job_id"] in shell.out and first not in shell.out.splitlines()[1].split()[0]
    assert shell.run("jobs", "cancel", "--all") == 0
    assert [line.split(":")[0] for line in shell.out.splitlines()] == [second["job_id"], first]


def test_a_job_is_waited_for_and_run_again(shell: Shell) -> None:
    assert shell.run("jobs", "submit", "queued", "--wait") == 0
    assert "is completed." in shell.out
    job = shell.out.split()[2]
    assert shell.run("jobs", "wait", job) == 0
    assert shell.run("jobs", "get", job) == 0 and "completed" in shell.out
    assert shell.run("jobs", "status", job) == 0 and "3/3" in shell.out
    for words in ((), ("-f",), ("--tail", "1")):
        assert shell.run("jobs", "logs", job, *words) == 0
        assert "trainer says hello" in shell.out
    assert shell.json("jobs", "logs", job)["eof"]
    assert shell.run("jobs", "events", job) == 0 and "Step 3/3" in shell.out
    last = shell.json("jobs", "events", job, "-f", "--type", "job.*")
    assert (last["type"], last["data"]["to"]) == ("job.status", "completed")
    assert shell.run("jobs", "retry", job, "--set", "max_train_steps=2", "--no-resume", "--wait") == 0
    again = shell.out.split()[2]
    assert shell.server.get(f"/api/jobs/{again}")["job"]["retry_of"] == job
    assert shell.run("jobs", "delete", job) == 0
    assert shell.run("jobs", "get", job) == 1 and "unknown_job" in shell.err


def test_a_job_is_paused_resumed_and_stopped(shell: Shell) -> None:
    job = shell.submit("--set", LONG)
    shell.server.wait_status(job, "running")
    assert shell.run("jobs", "retry", job) == 1
    assert shell.run("jobs", "pause", job) == 0
    shell.server.wait_status(job, "queued")
    assert shell.run("jobs", "resume", job) == 0
    shell.server.wait_status(job, "running")
    assert shell.run("jobs", "stop", job) == 0
    assert shell.run("jobs", "wait", job) == 9
    assert shell.run("jobs", "stop", job) == 1 and "job_not_running" in shell.err


def test_approval(shell: Shell) -> None:
    one, two = shell.submit("--for-approval"), shell.submit("--for-approval")
    assert shell.run("jobs", "approve", one) == 0
    assert shell.run("jobs", "reject", two, "--reason", "No room.") == 0
    assert shell.run("jobs", "wait", two) == 8 and "is rejected. No room." in shell.out
    assert shell.run("jobs", "wait", one) == 0
    assert shell.run("jobs", "approve", one) == 1 and "job_not_waiting" in shell.err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["submit", "nothing"], 1, "unknown_config"),
        (["submit", "queued", "--set", "learning_rat=1"], 1, "Did you mean --learning_rate?"),
        (["submit", "queued", "--label", "a100"], 2, "--label gpu_type=a100*"),
        (["submit", "queued", "-t", "moon"], 2, ""),
        (["submit"], 2, ""),
        (["cancel"], 2, "--all"),
        (["list", "--watch"], 2, "needs a terminal"),
        (["wait", "nothing"], 1, "unknown_job"),
        (["events", "nothing"], 1, "unknown_job"),
    ],
)
def test_what_the_shell_is_told(shell: Shell, words: list[str], code: int, told: str) -> None:
    assert shell.run("jobs", *words) == code
    assert told in shell.err


@pytest.mark.parametrize(
    ("status", "code"),
    [("completed", 0), ("failed", 8), ("lost", 8), ("rejected", 8), ("stopped", 9), ("cancelled", 9)],
)
def test_how_a_job_ended(status: str, code: int) -> None:
    assert exit_of_job(status) == code


# A shell's job in the background ignores the interrupt, and so does all that it starts; one at a terminal does not.
AT_A_TERMINAL = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from simpletuner.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
)


def test_a_table_refreshes_in_a_terminal(shell: Shell) -> None:
    job = shell.submit()
    parent, child = pty.openpty()
    command = [sys.executable, "-c", AT_A_TERMINAL, "jobs", "list", "-w"]
    environ = os.environ | {"PYTHONPATH": str(SOURCE), "TERM": "xterm", "COLUMNS": "150", "LINES": "20"}
    watching = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=environ)
    os.close(child)
    seen = bytearray()

    def read() -> None:
        while part := _read(parent):
            seen.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: job.encode() in seen and b"Ctrl-C" in seen)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 130
    reader.join(10)
    os.close(parent)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_the_commands_of_jobs_import_no_torch() -> None:
    modules = "simpletuner.cli.jobs, simpletuner.cli.job_submit, simpletuner.cli.devices"
    code = f"import sys, {modules}; print([name for name in ('torch', 'fastapi', 'sqlalchemy') if name in sys.modules])"
    environ = os.environ | {"PYTHONPATH": str(SOURCE)}
    answer = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
