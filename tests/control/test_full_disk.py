"""What a full disk does to a run of the real trainer, on a file system of its own. training.md §9, api.md §7."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from control_world import ServerProcess, until
from nano_world import OPTIONS, TERMINAL, start_server

from simpletuner.checkpoints import find_faults, list_checkpoints
from simpletuner.job import Command, CommandName, CommandReader, ExitRecord, JobDir
from simpletuner.jobs.fleet import Fleet
from simpletuner.jobs.runner import write_when_possible
from simpletuner.jobs.worker_slot import WorkerTimers
from simpletuner.store.store import Store

BALLAST = "ballast"
STEPS = 16
SHORT = OPTIONS | {"max_train_steps": STEPS, "checkpoint_step_interval": 4}
Mount = Callable[[str, str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`mount(name, size)`: a file system in memory, in the workspace."""
    mounted: list[Path] = []

    def on(name: str, size: str) -> Path:
        place = tmp_path / name
        place.mkdir()
        ran = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False, capture_output=True
        )
        if ran.returncode:
            pytest.skip(f"no file system can be mounted here: {ran.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield on
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> None:
    with suppress(OSError), (place / BALLAST).open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def make_room(place: Path) -> None:
    (place / BALLAST).unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=200m", str(place)], check=True)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], ServerProcess]]:
    running: list[ServerProcess] = []

    def start() -> ServerProcess:
        running.append(start_server(tmp_path))
        return running[0]

    yield start
    for server in running:
        server.close()


def end_of(server: ServerProcess, **options: Any) -> dict[str, Any]:
    job_id = server.start_job(output_dir="output/full", **SHORT | options)["job_id"]
    return server.wait_status(job_id, *TERMINAL, within_s=60, every_s=0.1)


def check_failure(job: dict[str, Any]) -> None:
    assert (job["status"], job["exit"]["code"], job["exit"]["error_code"]) == ("failed", 73, "disk_full"), job
    assert job["exit"]["hint"]


def check_completes(server: ServerProcess, **options: Any) -> None:
    job = end_of(server, **options)
    assert job["status"] == "completed", job
    newest = list_checkpoints(server.workspace / "output/full")[0]
    assert (newest.step, find_faults(newest.path)) == (STEPS, [])


@pytest.mark.slow
@pytest.mark.long
def test_no_room_for_latents(mount: Mount, serve: Callable[[], ServerProcess]) -> None:
    place = mount("cache", "32k")
    server = serve()
    check_failure(end_of(server))
    make_room(place)
    check_completes(server)


@pytest.mark.slow
def test_no_room_for_checkpoints(mount: Mount, serve: Callable[[], ServerProcess]) -> None:
    place = mount("output", "60m")
    server = serve()
    keep_all = {"checkpoints_total_limit": 0}
    check_failure(end_of(server, **keep_all))
    whole = list_checkpoints(place / "full")
    assert whole and all(find_faults(folder.path) == [] for folder in whole)
    assert not list((place / "full").glob(".checkpoint-*"))
    make_room(place)
    check_completes(server, **keep_all)


@pytest.mark.slow
@pytest.mark.long
def test_no_room_for_the_journal(mount: Mount, serve: Callable[[], ServerProcess]) -> None:
    place = mount(".simpletuner", "8m")
    server = serve()
    job_id = server.start_job(output_dir="output/full", **SHORT | {"max_train_steps": 2000})["job_id"]
    until(lambda: list_checkpoints(server.workspace / "output/full"), within_s=60)
    fill(place)
    # Of the file system that is full, all that is left is what was reserved for this.
    until(lambda: server.folder(job_id).read_exit())
    answer = server.http.post("/api/training/start", json=server.options(output_dir="output/other"))
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full"), answer.text
    make_room(place)
    check_failure(server.wait_status(job_id, *TERMINAL))
    errors = [event for event in server.events(types="error") if event["job_id"] == job_id]
    assert [event["data"]["code"] for event in errors] == ["disk_full"]
    assert find_faults(list_checkpoints(server.workspace / "output/full")[0].path) == []
    check_completes(server)
    assert "disk is full" in (server.workspace / "server.log").read_text()


def test_how_a_job_ended_finds_the_room_that_was_kept_for_it(mount: Mount) -> None:
    place = mount("job", "256k")
    job = JobDir(place)
    job.reserve_exit()
    fill(place)
    with pytest.raises(OSError):
        job.write_exit(ExitRecord(code=73))
    job.release_exit()
    write_when_possible(job, ExitRecord(code=73, log_tail=["x" * 8000] * 50))
    found = job.read_exit()
    assert found is not None and (found.code, found.log_tail) == (73, [])


def test_a_runner_waits_for_room(mount: Mount) -> None:
    place = mount("job", "64k")
    job = JobDir(place)
    fill(place)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            make_room(place)

    write_when_possible(job, ExitRecord(code=0, log_tail=["the last words"]), sleep=sleep)
    found = job.read_exit()
    assert found is not None and found.log_tail == ["the last words"] and len(slept) == 3


def test_a_full_database_is_a_full_disk(mount: Mount) -> None:
    place = mount("state", "1m")
    store = Store.open(place)
    store.settings.set("before", 1)
    fill(place)
    with pytest.raises(OSError) as caught:
        for number in range(100):
            store.settings.set(f"name{number}", "x" * 4000)
    assert caught.value.errno == errno.ENOSPC
    make_room(place)
    store.settings.set("after", 2)
    assert (store.settings.get("before"), store.settings.get("after")) == (1, 2)
    store.close()


def test_a_full_database_stops_no_heartbeat(mount: Mount) -> None:
    place = mount("state", "1m")
    store = Store.open(place)
    store.workers.create("w", "a", "persistent", {}, "hash")
    store.workers.change("w", gpu_info={"count": 1}, connected_at="2026-01-01T00:00:00.000Z")
    fleet = Fleet(store, WorkerTimers())
    fleet.asks("w")
    fill(place)
    for number in range(100):
        fleet.beat("w", used_gb=number)
    with pytest.raises(OSError):
        fleet.round()
    assert [slot.status for slot in fleet.slots()] == ["idle"] and fleet.load("w") == {"vram_used_gb": 99}
    make_room(place)
    assert fleet.round(), "what could not be told is told when there is room"
    assert [item.event["data"]["to"] for _, item in store.outbox.waiting()] == ["idle"]
    store.close()


def test_a_command_that_was_cut_short_spoils_no_other(mount: Mount) -> None:
    place = mount("job", "64k")
    job = JobDir(place)
    job.send(Command(command=CommandName.CHECKPOINT, request_id="one"))
    # To the last page: the end of this one still has room for a few bytes, then no more.
    fill(place)
    with pytest.raises(OSError):
        for number in range(200):
            job.send(Command(command=CommandName.VALIDATE, request_id=f"lost{number}"))
    make_room(place)
    job.send(Command(command=CommandName.STOP, request_id="last"))
    names = [command.request_id for command in CommandReader(job).read()]
    assert (names[0], names[-1]) == ("one", "last")
