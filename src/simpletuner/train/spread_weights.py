"""Every weight of a denoiser that is spread over the ranks, as checkpoints and exports see it: whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from simpletuner.families.base import Family
from simpletuner.train.company import Company
from simpletuner.train.host_copies import HostCopies
from simpletuner.train.trained import FullWeights
from simpletuner.train.update import Update


class SpreadWeights(FullWeights):
    """`kind`: the denoiser's class before it was spread. Rank 0 saves and exports in company, all ranks load."""

    def __init__(
        self, family: Family, denoiser: nn.Module, probe: Callable[[nn.Module], Tensor], kind: Any, company: Company
    ) -> None:
        super().__init__(family, denoiser, probe)
        self._kind = kind
        self._company = company

    def save(self, folder: Path, update: Update) -> None:
        self._write(self._company.weights(), self._company.average(), folder)
        self._company.write_parts(folder)

    def stage(self, update: Update, copies: HostCopies) -> None:
        """All ranks write at once, and wait for each other."""

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        saved = self._saved_weights(folder)
        for name, value in self.denoiser.state_dict().items():
            if isinstance(value, DTensor):
                rows = saved[name].chunk(value.device_mesh.size())[value.device_mesh.get_local_rank()]
                value.to_local().copy_(rows)
            else:
                value.copy_(saved[name])
        self._company.read_parts(folder)

    def _whole(self) -> nn.Module:
        return self._twin(self._company.weights())
