"""A server, and workers that dial in to it through lines that can be cut, with the fake trainer and short leases."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from control_world import FAKE_TRAINER, SOURCE, ServerProcess, cmd, until
from faulty_line import FaultyLine
from namespace_line import NamespaceLine

from simpletuner.checkpoints import list_checkpoints

LEASE_S = 6.0
IN_NAMESPACES = bool(os.environ.get("WORKER_NAMESPACES"))
"""Root's: each worker is a machine of its own in the network, else its line is a proxy."""


class WorkerProcess:
    """`simpletuner worker`, in a folder of its own; the server is at the end of `line`."""

    def __init__(self, server: ServerProcess, folder: Path, name: str, *words: str, **environ: str) -> None:
        self._server = server
        self.folder = folder
        self.name = name
        folder.mkdir()
        made = server.http.post("/api/admin/workers", json={"name": name})
        assert made.status_code == 201, made.text
        self.worker_id: str = made.json()["worker_id"]
        self.line = (NamespaceLine if IN_NAMESPACES else FaultyLine)(server.port)
        self._words = words
        self._environ = {
            **os.environ,
            "PYTHONPATH": str(SOURCE),
            "SIMPLETUNER_TRAINER": str(FAKE_TRAINER),
            "SIMPLETUNER_DEVICES": "cpu:1",
            "SIMPLETUNER_ORCHESTRATOR_URL": f"http://{self.line.host}:{self.line.port}",
            "SIMPLETUNER_WORKER_TOKEN": made.json()["token"],
            **environ,
        }
        self.start()
        until(lambda: self.status() == "idle")

    def start(self) -> None:
        command = [
            *self.line.prefix,
            sys.executable,
            "-m",
            "simpletuner.cli.main",
            "worker",
            "--name",
            self.name,
            *self._words,
        ]
        with (self.folder / "worker.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=self._environ, stdout=log, stderr=log)

    def run_again(self, **environ: str) -> subprocess.CompletedProcess[str]:
        """A second one, which is expected to end by itself."""
        command = [sys.executable, "-m", "simpletuner.cli.main", "worker", "--name", self.name]
        place = {"cwd": self.folder, "env": self._environ | environ}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **place)

    def status(self) -> str:
        listed = self._server.get("/api/admin/workers")["workers"]
        return next(worker["status"] for worker in listed if worker["worker_id"] == self.worker_id)

    def keeper(self) -> psutil.Process:
        return self._find("simpletuner.worker.keeper")

    def trainer(self) -> psutil.Process:
        return self._find(str(FAKE_TRAINER))

    def processes(self) -> list[psutil.Process]:
        """Of jobs."""
        return [
            process
            for process in psutil.process_iter()
            if any(str(self.folder) in word for word in cmd(process)) and process.status() != psutil.STATUS_ZOMBIE
        ]

    def run_folder(self, job_id: str, epoch: int) -> Path:
        return self.folder / ".simpletuner" / "worker" / self.name / "jobs" / f"{job_id}-{epoch}"

    def die(self) -> None:
        """As when its power fails."""
        self.process.kill()
        self.process.wait()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        self.die()
        self.line.close()

    def _find(self, word: str) -> psutil.Process:
        def ask() -> psutil.Process | None:
            return next((process for process in self.processes() if word in cmd(process)), None)

        found = until(ask)
        assert found is not None
        return found


class WorkerWorld:
    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.server = ServerProcess(
            workspace,
            host="0.0.0.0" if IN_NAMESPACES else "127.0.0.1",
            SIMPLETUNER_LEASE_S=str(LEASE_S),
            SIMPLETUNER_HEARTBEAT_S=str(LEASE_S / 4),
        )
        self.workers: list[WorkerProcess] = []

    def add(self, *words: str, **behaviour: Any) -> WorkerProcess:
        """`behaviour` is that of its trainers."""
        name = f"w{len(self.workers)}"
        told = {"FAKE_TRAINER": json.dumps(behaviour)} if behaviour else {}
        worker = WorkerProcess(self.server, self.workspace / name, name, *words, **told)
        self.workers.append(worker)
        return worker

    def submit(self, name: str = "job", **body: Any) -> str:
        pictures = self.workspace / "pictures"
        pictures.mkdir(exist_ok=True)
        (pictures / "one.png").write_bytes(b"one")
        (pictures / "deep").mkdir(exist_ok=True)
        (pictures / "deep" / "two.png").write_bytes(b"two" * 1000)
        options = self.server.options(output_dir=f"output/{name}", checkpoints_total_limit=2)
        made = self.server.http.post("/api/configs", json={"name": name, "config": options})
        assert made.status_code == 201, made.text
        answer = self.server.http.post("/api/queue/submit", json={"config_name": name, "target": "worker", **body})
        assert answer.status_code == 202, answer.text
        return answer.json()["job_id"]

    def wait(self, job_id: str, *statuses: str, within_s: float = 30.0) -> dict[str, Any]:
        return self.server.wait_status(job_id, *statuses, within_s=within_s)

    def step(self, job_id: str) -> int:
        progress = self.server.get(f"/api/jobs/{job_id}")["job"]["progress"]
        return progress["step"] if progress else 0

    def until_step(self, job_id: str, step: int) -> None:
        until(lambda: self.step(job_id) >= step)

    def steps_told(self, job_id: str) -> list[tuple[int, int]]:
        """(attempt, step) of every progress event, in order."""
        events = self.server.events(job_id=job_id, types="training.progress")
        return [(event["attempt"], event["progress"]["current"]) for event in events]

    def saved(self, name: str = "job") -> int:
        """Step of the newest checkpoint at the server."""
        return next((folder.step for folder in list_checkpoints(self.workspace / "output" / name)), 0)

    def weights(self, name: str = "job") -> list[str]:
        """Of the newest checkpoint at the server."""
        return (self.workspace / f"output/{name}/checkpoint-{self.saved(name)}/weights.txt").read_text().splitlines()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.server.close()
