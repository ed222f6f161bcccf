"""Many submits at once, against an executor that runs nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from simpletuner.job import Command, CommandName, CommandReader, ExitRecord, JobDir, JobStatus
from simpletuner.jobs.devices import Device
from simpletuner.jobs.feed import Feed
from simpletuner.jobs.placement import Placement
from simpletuner.jobs.submit import Submission, submit
from simpletuner.jobs.supervisor import Supervisor
from simpletuner.jobs.watch import LOST_AFTER_S, SPAWN_GRACE_S
from simpletuner.store.settings import JOB_MAX_CONCURRENT
from simpletuner.store.store import Store


class FakeExecutor:
    """At the protocol: remembers what it was asked to start."""

    def __init__(self) -> None:
        self.alive: dict[str, JobDir] = {}
        self.started: list[tuple[str, tuple[int, ...]]] = []
        self.fails = False

    def start(self, job: JobDir, devices: Sequence[Device]) -> None:
        if self.fails:
            raise OSError("no processes left")
        self.alive[job.root.name] = job
        self.started.append((job.root.name, tuple(device.index for device in devices)))

    def is_alive(self, job: JobDir) -> bool:
        return job.root.name in self.alive

    def send(self, job: JobDir, command: Command) -> None:
        job.send(command)

    def reap(self) -> None:
        pass

    def end(self, job_id: str, code: int = 0) -> None:
        self.alive.pop(job_id).write_exit(ExitRecord(code=code))


class Bench:
    def __init__(self, state: Path, slots: int) -> None:
        self.state = state
        (state / "jobs").mkdir(exist_ok=True)
        self.store = Store.open(state)
        self.executor = FakeExecutor()
        self.now = 1000.0
        devices = [Device(index, "gpu", 24, "cuda") for index in range(slots)]
        self.placement = Placement(self.store, self.executor, devices, state / "jobs")
        self.supervisor = Supervisor(self.store, self.executor, self.placement, Feed(), clock=lambda: self.now)

    def submit(self, number: int = 0, *, num_processes: int = 1) -> str:
        submission = Submission(
            config={},
            provenance={},
            datasets=[],
            workspace=str(self.state),
            config_dir=str(self.state),
            output_dir=f"/output-{number}",
            num_processes=num_processes,
        )
        return submit(submission, store=self.store, supervisor=self.supervisor).job.job_id

    def status(self, job_id: str) -> JobStatus:
        job = self.store.jobs.get(job_id)
        assert job is not None
        return job.status


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    built = Bench(tmp_path, slots=3)
    built.store.settings.set(JOB_MAX_CONCURRENT, None)
    yield built
    built.store.close()


def test_concurrent_submits_share_the_devices(bench: Bench) -> None:
    submitted: list[str] = []
    threads = [
        threading.Thread(target=lambda at=at: [submitted.append(bench.submit(at * 10 + each)) for each in range(5)])
        for at in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = [job.job_id for job in bench.store.jobs.with_status(list(JobStatus))]
    assert sorted(order) == sorted(submitted)
    while bench.executor.alive:
        leases = bench.store.jobs.leases()
        assert len(bench.executor.alive) <= 3
        assert set(leases.values()) == set(bench.executor.alive)
        bench.executor.end(next(iter(bench.executor.alive)))
        bench.supervisor.tick()
    assert [job_id for job_id, _ in bench.executor.started] == order
    assert {bench.status(job_id) for job_id in order} == {JobStatus.COMPLETED}
    assert bench.store.jobs.leases() == {}


def test_one_output_folder_is_one_job_at_a_time(bench: Bench) -> None:
    first, second = bench.submit(1), bench.submit(1)
    assert bench.placement.waits()[second].reason_code == "output_dir_busy"
    bench.executor.end(first)
    bench.supervisor.tick()
    assert bench.status(second) is JobStatus.STARTING


def test_a_launch_that_fails_is_a_failed_job(bench: Bench) -> None:
    bench.executor.fails = True
    job_id = bench.submit()
    bench.supervisor.tick()
    job = bench.store.jobs.get(job_id)
    assert job is not None
    assert (job.status, job.exit and job.exit["error_code"]) == (JobStatus.FAILED, "launch_failed")


def test_silence_is_loss_only_after_a_while(bench: Bench) -> None:
    never, once = bench.submit(1), bench.submit(2)
    bench.placement.job_dir(once).lock_path.touch()
    bench.executor.alive.clear()
    bench.supervisor.tick()
    assert {bench.status(never), bench.status(once)} == {JobStatus.STARTING}
    bench.now += LOST_AFTER_S
    bench.supervisor.tick()
    assert (bench.status(never), bench.status(once)) == (JobStatus.STARTING, JobStatus.LOST)
    bench.now += SPAWN_GRACE_S
    bench.supervisor.tick()
    assert bench.status(never) is JobStatus.LOST


def test_cancel_overrides_stop_and_not_the_reverse(bench: Bench) -> None:
    job_id = bench.submit()
    for mode in ("yield", "stop", "cancel", "stop"):
        bench.supervisor.request_end(job_id, mode)
    sent = [command.command for command in CommandReader(bench.placement.job_dir(job_id)).read()]
    assert sent == [CommandName.YIELD, CommandName.STOP, CommandName.CANCEL]
    bench.executor.end(job_id, 75)
    bench.supervisor.tick()
    assert bench.status(job_id) is JobStatus.CANCELLED


def test_one_broken_job_does_not_stop_the_others(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    broken, whole = bench.submit(1), bench.submit(2)
    (bench.placement.job_dir(broken).root / "exit.json").write_text("{")
    bench.executor.end(whole)
    bench.supervisor.tick()
    assert bench.status(whole) is JobStatus.COMPLETED
    assert f"Failed while looking at job {broken}" in caplog.text


def test_a_stale_exit_record_belongs_to_its_attempt(bench: Bench) -> None:
    job_id = bench.submit()
    bench.placement.job_dir(job_id).write_exit(ExitRecord(code=0, attempt=7))
    bench.supervisor.tick()
    assert bench.status(job_id) is JobStatus.STARTING
