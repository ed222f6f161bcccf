"""The numbers of the server and of a job. api.md §2.8."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess
from prometheus_client.parser import text_string_to_metric_families

from simpletuner.events import Event, EventType, Journal, Progress
from simpletuner.run_lock import LOCK, METRICS, RunLock, write_lock
from simpletuner.store.job_row import NewJob


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcess]:
    running = InProcess(tmp_path)
    yield running
    running.close()


def test_the_server_in_numbers(server: InProcess) -> None:
    add_job(server, server.settings.workspace)
    answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["simpletuner_jobs", "queued"] == 1 and found["simpletuner_jobs", "running"] == 0
    assert found["simpletuner_devices",] == 1 and found["simpletuner_devices_allocated",] == 0
    assert found["process_resident_memory_bytes",] > 1e6


def add_job(server: InProcess, output_dir: Path) -> None:
    server.core.store.jobs.insert(NewJob(job_id="one", output_dir=str(output_dir), user_id="local"))


def lock_of(job_id: str) -> RunLock:
    return RunLock(
        job_id=job_id, workspace="", config={}, provenance={}, datasets=[], data={}, versions={}, seed=0, device="cpu"
    )


def ask(server: InProcess, **query: Any) -> Any:
    return server.ask("GET", "/api/jobs/one/metrics", params=query).json()


def test_the_steps_of_a_job(server: InProcess, tmp_path: Path) -> None:
    add_job(server, tmp_path)
    rows = [{"step": step, "loss": None if step == 3 else 1 / step, "epoch": 1} for step in range(1, 1001)]
    torn = '{"step": 1001, "lo'
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    write_lock(tmp_path, lock_of("one"))
    every = ask(server)
    assert every["series"].keys() == {"loss", "epoch"} and every["last_step"] == 1000
    assert every["series"]["loss"][:3] == [[1, 1.0], [2, 0.5], [3, None]]
    for most in (1, 2, 7, 333, 999, 5000):
        (points,) = ask(server, names="loss", max_points=most)["series"].values()
        steps = [step for step, _ in points]
        assert len(steps) <= most and steps[-1] == 1000 and len({b - a for a, b in pairwise(steps)}) <= 1
    assert [step for step, _ in ask(server, since_step=999)["series"]["loss"]] == [999, 1000]
    assert ask(server, since_step=2000) == {"series": {}, "last_step": None}


def test_another_run_in_the_same_folder_is_not_this_jobs(server: InProcess, tmp_path: Path) -> None:
    add_job(server, tmp_path)
    write_lock(tmp_path, lock_of("two"))
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 9}\n')
    assert (tmp_path / LOCK).exists() and ask(server)["series"] == {}
    journal = Journal(tmp_path / "events.jsonl", job_id="one")
    progress = Progress(label="Steps", current=5, total=10, percent=50, metrics={"loss": 0.5})
    journal.append(Event(type=EventType.TRAINING_PROGRESS, progress=progress))
    journal.close()
    server.core.store.events.tail("one", tmp_path / "events.jsonl")
    assert ask(server) == {"series": {"loss": [[5, 0.5]]}, "last_step": 5}
