"""Fixtures of the control world."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from control_world import ServerProcess, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    built = World(tmp_path)
    yield built
    built.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """For tests that kill it, or need an empty one."""
    running = ServerProcess(tmp_path)
    yield running
    running.close()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """For tests that leave no active job behind."""
    running = ServerProcess(tmp_path_factory.mktemp("shared"))
    yield running
    running.close()
