"""Kill -9 of any process of a run, again and again, with the real trainer. api.md §7; training.md §6.2."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from control_world import SOURCE, ServerProcess, cmd, processes_of
from nano_world import OPTIONS, TERMINAL, start_server

from simpletuner.events import read_journal
from simpletuner.jobs.equality import compare_runs
from simpletuner.jobs.runner import launcher
from simpletuner.jobs.scratch import Scratch

SEED = 20
SERVER_KILLS = int(os.environ.get("SERVER_KILLS", "3"))
"""`SERVER_KILLS=26` makes it the thirty kills of a thorough run, half a minute more."""
VICTIMS = ["server"] * SERVER_KILLS + ["trainer", "runner", "all", "rank"]
TWO_RANKS = OPTIONS | {"num_processes": 2, "train_batch_size": 1}


@pytest.fixture
def real(tmp_path: Path) -> Iterator[ServerProcess]:
    running = start_server(tmp_path, devices="cpu:2")
    yield running
    running.close()


class Killer:
    """Starts runs one after the other in folders of their own, and kills what it is told to."""

    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server = server
        self.generator = random.Random(seed)
        self.folder = 0
        self.job_id = ""
        self.jobs: list[str] = []
        self.hits: Counter[str] = Counter()

    @property
    def output(self) -> str:
        return f"killed{self.folder}"

    def status(self) -> str:
        return self.server.get(f"/api/jobs/{self.job_id}")["job"]["status"]

    def go_on(self) -> str:
        """See to it that a run is under way: the next one, or the same again from its last checkpoint."""
        status = self.status() if self.job_id else "completed"
        if status in TERMINAL:
            self.folder += status == "completed"
            self.job_id = self.server.start_job(output_dir=self.output, **TWO_RANKS)["job_id"]
            self.jobs.append(self.job_id)
            status = "starting"
        return status

    def kill(self, victim: str) -> None:
        self.go_on()
        if victim != "server" and (self.generator.random() < 0.75 or victim == "rank"):
            # Else wherever it is in its start, where there are no ranks yet.
            self.server.wait_status(self.job_id, "running", *TERMINAL, within_s=60, every_s=0.1)
        time.sleep(self.generator.uniform(0, 0.3))
        processes = processes_of(self.server.folder(self.job_id))
        runners = [process for process in processes if "simpletuner.jobs.runner" in cmd(process)]
        trainers = [process for process in processes if process not in runners]
        ranks = [process for process in trainers if "torch.distributed.run" not in cmd(process)]
        doomed = {
            "server": [],
            "runner": runners,
            "trainer": trainers,
            "rank": self.generator.sample(ranks, min(1, len(ranks))),
            "all": runners + trainers,
        }[victim]
        self.hits[f"{victim} while {self.status()}"] += 1
        if victim in ("server", "all"):
            os.kill(self.server.process.pid, signal.SIGKILL)
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if victim in ("server", "all"):
            self.server.process.wait()
            self.server.start()
        if victim != "server":
            self.server.wait_status(self.job_id, *TERMINAL)

    def finish(self) -> None:
        while self.go_on() != "completed":
            self.server.wait_status(self.job_id, *TERMINAL, within_s=60, every_s=0.1)
            if self.status() == "completed":
                return


def start_apart(server: ServerProcess, job_id: str) -> subprocess.Popen[bytes]:
    """The same run as a job's, by a trainer that no server knows, into `straight`."""
    job = server.folder(job_id)
    config, datasets = job.read_config()["config"], job.read_datasets()
    scratch = Scratch(server.workspace, config=config, datasets=datasets, workspace=str(server.workspace))
    command = [sys.executable, *launcher(2), "-m", "simpletuner.train", str(scratch.job("straight").root)]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    with (server.workspace / "straight.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=server.workspace)


@pytest.mark.slow
def test_kills_change_nothing(real: ServerProcess) -> None:
    """In a row, at seeded random moments, of runs with two ranks: of the server, of one rank, of the trainer and all
    its processes, of the runner, whose trainer dies with it, of everything at once. Each waits up to 0.3 s; three in
    four of those that end a trainer, and that of a rank, wait until it trains. The killed job is started again with
    `latest`; a run that is finished is followed by another one.
    """
    killer = Killer(real, SEED)
    killer.go_on()
    straight = start_apart(real, killer.job_id)
    victims = list(VICTIMS)
    killer.generator.shuffle(victims)
    for victim in victims:
        killer.kill(victim)
    killer.finish()
    assert killer.hits.total() == len(VICTIMS)
    assert straight.wait(timeout=60) == 0, (real.workspace / "straight.log").read_text()
    for number in range(1, killer.folder + 1):
        compared = compare_runs(real.workspace / "straight", real.workspace / f"killed{number}")
        assert [row for row in compared if row.difference] == [] and len(compared) > 5
    check_events(real, killer.jobs)
    check_nothing_is_left(real, killer.jobs)


def check_events(server: ServerProcess, jobs: list[str]) -> None:
    events = server.events()
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert len({event["id"] for event in events}) == len(events)
    for job_id in jobs:
        # The trainer's and the runner's, whose numbers are their lines; the server's own have other ids.
        ids = [event["id"].removeprefix(f"{job_id}:") for event in events if event.get("job_id") == job_id]
        numbers = [int(number) for number in ids if number.isdigit()]
        lines = [line for _, line in read_journal(server.folder(job_id).journal_path) if is_whole(line)]
        assert numbers == list(range(1, len(lines) + 1))
        told = [event["data"]["to"] for event in events if event["type"] == "job.status" and event["job_id"] == job_id]
        assert told[:2] == ["queued", "starting"] and told[-1] in TERMINAL and len(told) == len(set(told))


def is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def check_nothing_is_left(server: ServerProcess, jobs: list[str]) -> None:
    assert [job for job in jobs if server.folder(job).is_locked()] == []
    status = server.get("/api/system/status?include_allocation=true")
    assert status["gpu_allocation"]["allocated_gpus"] == []
    own = server.process.pid
    left = [p for p in psutil.process_iter() if p.pid != own and any(str(server.workspace) in word for word in cmd(p))]
    assert [cmd(process) for process in left] == []
    assert list(server.workspace.glob("*/.checkpoint-*")) == []
