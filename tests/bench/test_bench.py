"""The benchmark command works, and what it counts depends on no clock. Nothing here judges a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simpletuner.bench import overhead
from simpletuner.bench.figure import Measured, as_markdown, circumstances, lower_bound
from simpletuner.bench.scene import PRECISIONS, Scene

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def process_as_found() -> Iterator[None]:
    """One thread; and a run flushes denormals, which the tests of floats do not bear."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


def figures(found: Measured, name: str) -> dict[str, float]:
    """By precision."""
    return {figure.name[:4]: figure.value for figure in found.figures if figure.name[6:].startswith(name)}


def test_the_counters_of_a_quiet_step_are_deterministic(tmp_path: Path) -> None:
    first = overhead.measure(Scene(tmp_path / "first", 16), steps=2)
    second = overhead.measure(Scene(tmp_path / "second", 16), steps=2)
    assert first.details == second.details
    for name, most in (("host synchronisations", 0), ("torch operations outside", 25), ("Python calls", 120)):
        found = figures(first, name)
        assert found.keys() == set(PRECISIONS)
        assert all(value <= most for value in found.values()), (name, found)
    assert "overhead" in as_markdown([first], circumstances())


def test_the_bound_lies_below_the_median() -> None:
    ratios = [1.0, 1.01, 1.02, 1.03, 1.04]
    assert 1.0 <= lower_bound(ratios) <= 1.02


@pytest.mark.long
def test_the_command_prints_json() -> None:
    words = ["-m", "simpletuner.cli.main", "bench", "loader", "--steps", "2", "--pictures", "8", "--json"]
    ran = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert {"device", "torch", "commit"} <= told.keys()
    assert [found["benchmark"] for found in told["measured"]] == ["loader"]
