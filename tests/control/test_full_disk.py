"""What a full disk does to a run of the real trainer, on a file system of a few megabytes. training.md §9, api.md §7."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from control_world import ServerProcess
from nano_world import OPTIONS, TERMINAL, start_server

from simpletuner.checkpoints import find_faults, list_checkpoints

pytestmark = pytest.mark.slow
BALLAST = "ballast"
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
    job_id = server.start_job(output_dir="output/full", **OPTIONS | options)["job_id"]
    return server.wait_status(job_id, *TERMINAL, within_s=60)


def check_failure(job: dict[str, Any]) -> None:
    assert (job["status"], job["exit"]["code"], job["exit"]["error_code"]) == ("failed", 73, "disk_full"), job
    assert job["exit"]["hint"]


def check_completes(server: ServerProcess, **options: Any) -> None:
    job = end_of(server, **options)
    assert job["status"] == "completed", job
    newest = list_checkpoints(server.workspace / "output/full")[0]
    assert (newest.step, find_faults(newest.path)) == (50, [])


def test_no_room_for_latents(mount: Mount, serve: Callable[[], ServerProcess]) -> None:
    place = mount("cache", "32k")
    server = serve()
    check_failure(end_of(server))
    make_room(place)
    check_completes(server)


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


def test_no_room_for_the_journal(mount: Mount, serve: Callable[[], ServerProcess]) -> None:
    place = mount(".simpletuner", "8m")
    server = serve()
    job_id = server.start_job(output_dir="output/full", **OPTIONS | {"max_train_steps": 2000})["job_id"]
    server.wait_status(job_id, "running", within_s=60)
    fill(place)
    answer = server.http.post("/api/training/start", json=server.options(output_dir="output/other"))
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full"), answer.text
    import time

    time.sleep(5)
    print(server.http.get(f"/api/jobs/{job_id}").text)
    print(subprocess.run(["ls", "-la", str(server.folder(job_id).root)], capture_output=True, text=True).stdout)
    print((server.workspace / "server.log").read_text()[-3000:])
    make_room(place)
    print(server.wait_status(job_id, *TERMINAL, within_s=20))
    check_failure(server.get(f"/api/jobs/{job_id}")["job"])
    check_completes(server)
