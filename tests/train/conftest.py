from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_world import TinyWorld, build_model

from simpletuner.train.half_on_cpu import fast_half_products
from simpletuner.train.memory import Phase
from simpletuner.train.rehearsal import Rehearsal


@pytest.fixture(scope="session", autouse=True)
def arithmetic() -> Iterator[None]:
    """One thread, as in CI, and the products of a trainer process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fast_half_products():
        yield
    torch.set_num_threads(before)


WITHOUT_WEIGHT = {
    "output_dir", "max_train_steps", "num_train_epochs", "seed", "resume_from_checkpoint", "checkpoint_step_interval",
    "checkpoints_total_limit", "learning_rate", "lr_scheduler", "lr_warmup_steps", "gradient_accumulation_steps",
}  # fmt: skip
"""Options that no tensor depends on."""


@pytest.fixture(scope="session", autouse=True)
def known_rehearsals() -> Iterator[None]:
    """A rehearsal depends on options and shapes alone, and takes longer than most runs here: each is made once."""
    known: dict[str, dict[Phase, int]] = {}
    play = Rehearsal.run

    def recall(self: Rehearsal, state_ratio: float | None) -> dict[Phase, int]:
        config = vars(self)["_config"]
        flat = {name: value for name, value in config.to_flat().items() if name not in WITHOUT_WEIGHT}
        key = repr((flat, config.text_embeds.text_encoder_batch_size, vars(self)["_shapes"], state_ratio))
        if key not in known:
            known[key] = play(self, state_ratio)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rehearsal, "run", recall)
        yield


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
