"""Everything about a run's place that must survive a restart, in one value."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simpletuner.data.plan import START, Position
from simpletuner.train.best import Best
from simpletuner.train.quarantine import Quarantine


@dataclass(slots=True)
class TrainState:
    """`step` optimizer steps are done; `position` is the first group that is not."""

    step: int = 0
    position: Position = START
    samples: int = 0
    ended_epoch: int | None = None
    """Epochs done, if the latest step finished one; nothing to restore."""
    quarantine: Quarantine = field(default_factory=Quarantine)
    best: Best = field(default_factory=Best)

    def advance(self, next_position: Position, samples: int) -> None:
        """A step is done; `next_position` is the plan's after its last group."""
        self.ended_epoch = next_position.epoch if next_position.epoch > self.position.epoch else None
        self.step += 1
        self.position = next_position
        self.samples += samples

    def as_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "position": asdict(self.position),
            "samples": self.samples,
            "strikes": self.quarantine.strikes,
            "best": self.best.as_dict(),
        }

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> TrainState:
        """Checkpoints from before there were strikes have none."""
        return cls(
            step=row["step"],
            position=Position(**row["position"]),
            samples=row["samples"],
            quarantine=Quarantine.of(row.get("strikes", {})),
            best=Best.from_dict(row.get("best", {})),
        )

    def go_back_to(self, earlier: TrainState) -> None:
        """Take an earlier place, in this very object; what was learnt about samples stays."""
        self.step, self.position, self.samples = earlier.step, earlier.position, earlier.samples
        self.ended_epoch, self.best = None, earlier.best


def seed_generators(seed: int) -> None:
    """The process-wide generators: what modules draw while they train. Draws of samples do not come from them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rng_tensors() -> dict[str, Tensor]:
    """The process-wide generators of torch, CUDA, numpy and python, as tensors."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([numpy_state["state"]["pos"], numpy_state["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors[_cuda()] = torch.cuda.get_rng_state()
    return tensors


def _cuda() -> str:
    """Of this rank's own device: another one's would cost memory there."""
    return f"cuda{torch.cuda.current_device()}"


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """The reverse. A CUDA device that is not this process's is left out."""
    torch.set_rng_state(tensors["torch"])
    version, *words = tensors["python"].tolist()
    gauss = tensors["python_gauss"].item()
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    position, has_gauss = tensors["numpy_position"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": tensors["numpy_gauss"].item(),
        }
    )
    if torch.cuda.is_available() and _cuda() in tensors:
        torch.cuda.set_rng_state(tensors[_cuda()])
