"""Shared by all tests: no network, one thread, and the flag that rewrites golden files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith("SIMPLETUNER_")]:
    # Somebody's server is nobody's business here.
    del os.environ[_name]
# Wall time judges nothing here: a busy machine is not a wrong answer.
settings.register_profile("unhurried", deadline=None, print_blob=True)
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-goldens", action="store_true", help="rewrite golden files instead of comparing with them")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """`golden(file, text)`: equal to what is kept, or kept from now on with --write-goldens."""

    def compare(path: Path, text: str) -> None:
        if request.config.getoption("--write-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing: run pytest --write-goldens"
        assert text == path.read_text(), f"{path.name} has changed: make goldens docs, and name it in CHANGELOG.md"

    return compare


@pytest.fixture(autouse=True)
def whole_numbers() -> None:
    """A run in this process flushes denormals to zero; the next test starts with all floats again."""
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)
