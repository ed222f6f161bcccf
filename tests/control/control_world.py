"""A control world in a folder, whose trainer is the script beside this file."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import psutil
from warm import WarmProcess, WarmStart

import simpletuner
from simpletuner.job import ACTIVE, JobDir, JobStatus
from simpletuner.jobs.devices import Device
from simpletuner.jobs.executor import LocalExecutor
from simpletuner.jobs.feed import Feed
from simpletuner.jobs.placement import Placement
from simpletuner.jobs.submit import Submission, Submitted, submit
from simpletuner.jobs.supervisor import Supervisor
from simpletuner.store.event_row import StoredEvent
from simpletuner.store.job_row import JobRow
from simpletuner.store.store import Store

T = TypeVar("T")
SOURCE = Path(simpletuner.__file__).parents[1]
FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")


def until(ask: Callable[[], T], *, within_s: float = 30.0, every_s: float = 0.01) -> T:
    """What `ask` gives once it is true; for real processes only."""
    deadline = time.monotonic() + within_s
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {ask}")
        time.sleep(every_s)
    return answer


class World:
    """Store, supervisor and executor of one state directory; `tick` is driven by the test."""

    def __init__(self, state: Path, *, slots: int = 1, preempts: bool = True, **executor_env: str) -> None:
        self.state = state
        (state / "jobs").mkdir(exist_ok=True)
        self.store = Store.open(state)
        environ = dict(os.environ) | {"SIMPLETUNER_TRAINER": str(FAKE_TRAINER)} | executor_env
        self.executor = LocalExecutor(environ)
        devices = [Device(index, "cpu") for index in range(slots)]
        self.placement = Placement(self.store, self.executor, devices, state / "jobs", preempts=preempts)
        self.supervisor = Supervisor(self.store, self.executor, self.placement, Feed())
        self.seen: list[StoredEvent] = []

    def submit(self, **config: Any) -> Submitted:
        extra = {
            name: config.pop(name)
            for name in ("no_wait", "num_processes", "stop_grace_s", "priority")
            if name in config
        }
        submission = Submission(
            config=config,
            provenance={},
            datasets=[],
            workspace=str(self.state),
            config_dir=str(self.state),
            output_dir=str(self.state / f"output-{len(list((self.state / 'jobs').iterdir()))}"),
            **extra,
        )
        return submit(submission, store=self.store, supervisor=self.supervisor)

    def job(self, job_id: str) -> JobRow:
        job = self.store.jobs.get(job_id)
        assert job is not None
        return job

    def folder(self, job_id: str) -> JobDir:
        return self.placement.job_dir(job_id)

    def tick_until(self, job_id: str, *statuses: JobStatus, within_s: float = 30.0) -> JobRow:
        def ask() -> JobRow | None:
            self.seen += self.supervisor.tick()
            job = self.job(job_id)
            return job if job.status in statuses else None

        found = until(ask, within_s=within_s)
        assert found is not None
        return found

    def runner(self, job_id: str) -> psutil.Process:
        return next(process for process in processes_of(self.folder(job_id)) if "runner" in " ".join(cmd(process)))

    def trainer(self, job_id: str) -> psutil.Process:
        return next(process for process in processes_of(self.folder(job_id)) if "runner" not in " ".join(cmd(process)))

    def close(self) -> None:
        for job in self.store.jobs.with_status(ACTIVE):
            for process in processes_of(self.folder(job.job_id)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self.store.close()


@cache
def warm_servers() -> WarmStart:
    """Begun by the first test that needs a server, ended with this process."""
    warm = WarmStart(["serve", "alembic.command"], os.environ | {"PYTHONPATH": str(SOURCE)})
    atexit.register(warm.close)
    return warm


class ServerProcess:
    """A real server on a free port."""

    def __init__(
        self, workspace: Path, *, environment: str = "", is_cold: bool = False, host: str = "127.0.0.1", **environ: str
    ) -> None:
        """`is_cold`: it imports for itself what a server needs."""
        self.workspace = workspace
        self._is_cold = is_cold
        self._environment = [environment] if environment else []
        self.port = free_port()
        self.url = f"http://localhost:{self.port}"
        self._environ = (
            dict(os.environ)
            | {"PYTHONPATH": str(SOURCE), "SIMPLETUNER_TRAINER": str(FAKE_TRAINER), "SIMPLETUNER_DEVICES": "cpu:1"}
            | environ
            | {"TEST_HOST": host}
        )
        self.http = httpx2.Client(base_url=self.url, timeout=20)
        self.start()

    def start(self) -> None:
        words = ["serve", str(self.workspace), str(self.port), *self._environment]
        with (self.workspace / "server.log").open("ab") as log:
            self.process = self._launch(
                words, {"env": self._environ, "cwd": self.workspace, "stdout": log, "stderr": log}
            )
        until(self.is_healthy, within_s=60)

    def _launch(self, words: list[str], place: dict[str, Any]) -> subprocess.Popen[bytes] | WarmProcess:
        if self._is_cold:
            return subprocess.Popen([sys.executable, str(FAKE_TRAINER.with_name("serve.py")), *words[1:]], **place)
        return WarmProcess(warm_servers().address, words, **place)

    def is_healthy(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError((self.workspace / "server.log").read_text())
        try:
            return self.http.get("/health").status_code == 200
        except httpx2.TransportError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=15)

    def get(self, path: str, **more: Any) -> Any:
        answer = self.http.get(path, **more)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, since_index: int = 0, **query: Any) -> list[dict[str, Any]]:
        """All pages from `since_index` on."""
        found: list[dict[str, Any]] = []
        has_more = True
        while has_more:
            page = self.get("/api/training/events", params={"since_index": since_index, **query})
            found += page["events"]
            since_index, has_more = page["next_index"], page["has_more"]
        return found

    def make_dataset(self) -> str:
        """Writes a dataset file; returns its path."""
        pictures = self.workspace / "pictures"
        pictures.mkdir(exist_ok=True)
        entry = {
            "id": "pictures",
            "type": "local",
            "dataset_type": "image",
            "instance_data_dir": str(pictures),
            "resolution": 64,
            "cache_dir_vae": "cache/vae",
        }
        path = self.workspace / "datasets.json"
        path.write_text(json.dumps([entry]))
        return str(path)

    def options(self, **more: Any) -> dict[str, Any]:
        """A request that starts."""
        return {
            "--model_family": "pixart_sigma",
            "--model_type": "full",
            "--output_dir": "output/demo",
            "--data_backend_config": self.make_dataset(),
            "--max_train_steps": 100_000,
        } | {f"--{name}": value for name, value in more.items()}

    def start_job(self, **more: Any) -> dict[str, Any]:
        answer = self.http.post("/api/training/start", json=self.options(**more))
        assert answer.status_code == 202, answer.text
        return answer.json()

    def wait_status(self, job_id: str, *statuses: str, within_s: float = 30.0, every_s: float = 0.01) -> dict[str, Any]:
        def ask() -> dict[str, Any] | None:
            job = self.get(f"/api/jobs/{job_id}")["job"]
            return job if job["status"] in statuses else None

        found = until(ask, within_s=within_s, every_s=every_s)
        assert found is not None
        return found

    def folder(self, job_id: str) -> JobDir:
        return JobDir(self.workspace / ".simpletuner" / "jobs" / job_id)

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.kill()
        for folder in (self.workspace / ".simpletuner" / "jobs").iterdir():
            for process in processes_of(JobDir(folder)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cmd(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def processes_of(folder: JobDir) -> list[psutil.Process]:
    """Living processes that were given the job's folder."""
    return [
        process
        for process in psutil.process_iter()
        if str(folder.root) in cmd(process) and process.status() != psutil.STATUS_ZOMBIE
    ]
