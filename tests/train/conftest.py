from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_world import TinyWorld, build_model

from simpletuner.train.half_on_cpu import fast_half_products


@pytest.fixture(scope="session", autouse=True)
def arithmetic() -> Iterator[None]:
    """One thread, as in CI, and the products of a trainer process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fast_half_products():
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "pixart")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, model: Path) -> TinyWorld:
    """A world whose caches are filled once; runs that share it take output folders of their own."""
    return TinyWorld(tmp_path_factory.mktemp("shared"), model)


@pytest.fixture
def world(tmp_path: Path, model: Path) -> TinyWorld:
    return TinyWorld(tmp_path, model)


@pytest.fixture(scope="session")
def square(tmp_path_factory: pytest.TempPathFactory, model: Path) -> TinyWorld:
    """One bucket only: what the laws about the split into batches suppose."""
    return TinyWorld(tmp_path_factory.mktemp("square"), model, sizes=((64, 64),))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path, str], Path]:
    return lambda source, name: Path(shutil.copytree(source, tmp_path / name))
