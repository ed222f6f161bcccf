"""Many submits at once, against an executor that runs nothing."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from simpletuner.job import Command, CommandName, CommandReader, ExitRecord, JobDir, JobStatus
from simpletuner.jobs.device_memory import MemoryGauge, free_of_cards
from simpletuner.jobs.devices import Device, probe_nvidia
from simpletuner.jobs.executor import LOST_AFTER_S, SPAWN_GRACE_S
from simpletuner.jobs.feed import Feed
from simpletuner.jobs.placement import Placement, is_news
from simpletuner.jobs.scheduler import Start, Wait
from simpletuner.jobs.submit import GpusUnavailable, Refused, Submission, foresee, submit
from simpletuner.jobs.supervisor import Supervisor
from simpletuner.store.settings import FAIR_SHARE, GPU_MAX_CONCURRENT, JOB_MAX_CONCURRENT, USER_MAX_CONCURRENT
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

    def refusal(self, job: JobDir) -> str | None:
        return None

    def lost_after_s(self, job: JobDir) -> float:
        return LOST_AFTER_S if job.lock_path.exists() else SPAWN_GRACE_S

    def send(self, job: JobDir, command: Command) -> None:
        job.send(command)

    def forget(self, job: JobDir, *, lost: bool) -> None:
        pass

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

    def submission(self, number: int = 0, *, num_processes: int = 1) -> Submission:
        return Submission(
            config={},
            provenance={},
            datasets=[],
            workspace=str(self.state),
            config_dir=str(self.state),
            output_dir=f"/output-{number}",
            num_processes=num_processes,
        )

    def submit(self, number: int = 0, *, num_processes: int = 1) -> str:
        submission = self.submission(number, num_processes=num_processes)
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


def test_a_dry_run_says_what_the_next_submit_comes_to(bench: Bench) -> None:
    """Whatever the queue holds at that moment."""
    draw = random.Random(7)
    for name, value in ((GPU_MAX_CONCURRENT, 2), (USER_MAX_CONCURRENT, 2), (FAIR_SHARE, True)):
        bench.store.settings.set(name, value)
    kinds: set[str] = set()
    for number in range(60):
        submission = replace(
            bench.submission(number if draw.random() < 0.8 else 0, num_processes=draw.choice([1, 1, 2, 3, 4])),
            preferred_devices=draw.choice([(), (1, 2), (0,)]),
            any_gpu=draw.random() < 0.2,
            no_wait=draw.random() < 0.3,
            priority=draw.choice([0, 10, 30]),
            user_id=draw.choice("ab"),
            target=draw.choice(["auto", "auto", "local", "worker"]),
            for_approval=draw.random() < 0.1,
        )
        before = bench.store.jobs.count_by_status()
        foreseen = foresee(submission, supervisor=bench.supervisor)
        assert bench.store.jobs.count_by_status() == before
        kinds.add(type(foreseen).__name__)
        if isinstance(foreseen, Refused):
            with pytest.raises(GpusUnavailable) as refused:
                submit(submission, store=bench.store, supervisor=bench.supervisor)
            assert refused.value.refused == foreseen
        else:
            done = submit(submission, store=bench.store, supervisor=bench.supervisor)
            assert (done.wait or Start(done.job.job_id, done.job.devices or ())) == foreseen
        if bench.executor.alive and draw.random() < 0.4:
            bench.executor.end(draw.choice(sorted(bench.executor.alive)))
            bench.supervisor.tick()
    assert kinds == {"Start", "Wait", "Refused"}


def test_far_back_only_great_changes_of_a_position_are_told() -> None:
    wait = Wait("a", 150, "Waits.", "behind_head")
    said = {"position": 151, "reason": "Waits.", "reason_code": "behind_head"}
    assert not is_news(wait, said)
    assert is_news(replace(wait, position=130), said) and is_news(replace(wait, position=100), said)
    assert is_news(replace(wait, reason="Other."), said) and is_news(wait, None)
    assert not is_news(replace(wait, position=5), said | {"position": 5})


def test_free_memory_is_asked_for_once_a_second_by_the_name_of_the_device() -> None:
    now, asked = [0.0], []

    def read() -> dict[str, int]:
        asked.append(now[0])
        return {"3": 7, "5": 9, "6": 1}

    found = [Device(0, "gpu", 24, "cuda", "5"), Device(1, "gpu", 24, "cuda", "3"), Device(2, "gpu", 24, "cuda", "8")]
    gauge = MemoryGauge(found, read=read, clock=lambda: now[0])
    assert (gauge.free_bytes(), gauge.free_bytes()) == ({0: 9, 1: 7}, {0: 9, 1: 7})
    now[0] = 1.0
    gauge.free_bytes()
    assert asked == [0.0, 1.0]
    assert MemoryGauge([Device(0, "cpu")], read=read).free_bytes() == {} and len(asked) == 2


def test_long_plans_are_made_less_often(bench: Bench) -> None:
    """Unless something happens. Here it is the memory that takes long to read."""
    plans: list[float] = []

    def slow() -> dict[str, int]:
        plans.append(bench.now)
        bench.now += 0.5
        return {"0": 1}

    devices = [Device(0, "gpu", 24, "cuda", "0")]
    gauge = MemoryGauge(devices, read=slow, clock=count(step=10).__next__)
    placement = Placement(bench.store, bench.executor, devices, bench.state / "jobs", gauge=gauge)
    supervisor = Supervisor(bench.store, bench.executor, placement, Feed(), clock=lambda: bench.now)
    submit(replace(bench.submission(1), peak_bytes=10**9), store=bench.store, supervisor=supervisor)
    bench.now = 2000.0
    plans.clear()
    for _ in range(20):
        supervisor.tick()
        bench.now += 1
    assert plans == [2000.0, 2005.5, 2011.0, 2016.5]
    supervisor.replan()
    supervisor.tick()
    assert plans[4:] == [2022.0]


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the protocol: a card without a memory of its own says [N/A]."""
    program = tmp_path / "nvidia-smi"
    query = "--query-gpu=index,memory.total,memory.free,name"
    answer = "0, 81920, 81000, A card, PCIe\\n1, [N/A], [N/A], Another\\n"
    program.write_text(f'#!/bin/sh\n[ "$1" = {query} ] && printf "{answer}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert free_of_cards() == {"0": 81000 << 20}
    assert probe_nvidia() == [
        Device(0, "A card, PCIe", 80.0, "cuda", "0"),
        Device(1, "Another", 0.0, "cuda", "1"),
    ]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert free_of_cards() == {} and probe_nvidia() == []


def test_a_foreign_program_on_the_card_makes_a_job_wait(bench: Bench) -> None:
    free = {"0": 10**9, "1": 10**9, "2": 10**9}
    devices = [Device(index, "gpu", 24, "cuda", str(index)) for index in range(3)]
    gauge = MemoryGauge(devices, read=lambda: dict(free), clock=lambda: bench.now)
    placement = Placement(bench.store, bench.executor, devices, bench.state / "jobs", gauge=gauge)
    supervisor = Supervisor(bench.store, bench.executor, placement, Feed(), clock=lambda: bench.now)
    submission = replace(bench.submission(1), peak_bytes=8 * 10**9)
    waits = submit(submission, store=bench.store, supervisor=supervisor).wait
    assert waits is not None and waits.reason_code == "gpu_memory"
    free["1"] = 20 * 10**9
    bench.now += 2
    supervisor.tick()
    assert bench.executor.started == [(submission.job_id, (1,))]
