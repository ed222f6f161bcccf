"""A control world in a folder, whose trainer is the script beside this file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from simpletuner.job import ACTIVE, JobDir, JobStatus
from simpletuner.jobs.devices import Device
from simpletuner.jobs.executor import LocalExecutor
from simpletuner.jobs.feed import Feed
from simpletuner.jobs.placement import Placement
from simpletuner.jobs.submit import Submission, Submitted, submit
from simpletuner.jobs.supervisor import Supervisor
from simpletuner.store.events import StoredEvent
from simpletuner.store.job_row import JobRow
from simpletuner.store.store import Store

T = TypeVar("T")
FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")


def until(ask: Callable[[], T], *, within_s: float = 10.0) -> T:
    """What `ask` gives once it is true; for real processes only."""
    deadline = time.monotonic() + within_s
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {ask}")
        time.sleep(0.01)
    return answer


class World:
    """Store, supervisor and executor of one state directory; `tick` is driven by the test."""

    def __init__(self, state: Path, *, slots: int = 1, **executor_env: str) -> None:
        self.state = state
        (state / "jobs").mkdir(exist_ok=True)
        self.store = Store.open(state)
        environ = dict(os.environ) | {"SIMPLETUNER_TRAINER": str(FAKE_TRAINER)} | executor_env
        self.executor = LocalExecutor(environ)
        devices = [Device(index, "cpu") for index in range(slots)]
        self.placement = Placement(self.store, self.executor, devices, state / "jobs")
        self.supervisor = Supervisor(self.store, self.executor, self.placement, Feed())
        self.seen: list[StoredEvent] = []

    def submit(self, **config: Any) -> Submitted:
        extra = {name: config.pop(name) for name in ("no_wait", "num_processes", "stop_grace_s") if name in config}
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

    def tick_until(self, job_id: str, *statuses: JobStatus, within_s: float = 10.0) -> JobRow:
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
