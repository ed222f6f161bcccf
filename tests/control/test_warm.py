"""Processes that are forked warm end as others do."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from control_world import until
from warm import WarmProcess, WarmStart


@pytest.fixture
def warm() -> Iterator[WarmStart]:
    with closing(WarmStart(["warm_example"], os.environ)) as started:
        yield started


def start(warm: WarmStart, folder: Path, *words: str) -> WarmProcess:
    with (folder / "out").open("wb") as out:
        return WarmProcess(warm.address, ["warm_example", *words], env={"A": "b"}, cwd=folder, stdout=out, stderr=out)


def test_its_end_is_told(warm: WarmStart, tmp_path: Path) -> None:
    assert start(warm, tmp_path, "end", "7").wait(30) == 7
    assert (tmp_path / "out").read_text() == f"{tmp_path} b\n"
    sleeper = start(warm, tmp_path, "sleep")
    assert sleeper.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeper.wait(0)
    sleeper.terminate()
    assert sleeper.wait(30) == -signal.SIGTERM


def test_who_is_forsaken_ends_and_the_others_go_on(warm: WarmStart, tmp_path: Path) -> None:
    forsaken, other = start(warm, tmp_path, "sleep"), start(warm, tmp_path, "sleep")
    forsaken.forsake()
    until(lambda: not psutil.pid_exists(forsaken.pid))
    ended = start(warm, tmp_path, "sleep")
    # Both in one moment: it ends, and nobody asks for it any more.
    os.kill(ended.pid, signal.SIGKILL)
    ended.forsake()
    until(lambda: not psutil.pid_exists(ended.pid))
    assert other.poll() is None
    other.kill()
    assert other.wait(30) == -signal.SIGKILL
