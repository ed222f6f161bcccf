"""What a rank needs where weights are spread over several: from the phases of a run that has them whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from simpletuner.config.fsdp_options import FsdpOptions
from simpletuner.train.blocks import blocks_of
from simpletuner.train.memory import Phase

_AHEAD = 2
"""Blocks that are fetched at a time: the next one comes while one computes."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Of `num_ranks`; in bytes. `lasting`: weights, gradients, average and optimizer state of a run without parts."""

    denoiser: nn.Module
    options: FsdpOptions
    lasting: int
    num_ranks: int

    def phases(self, whole: dict[Phase, int]) -> dict[Phase, int]:
        """Of rank 0, which has whole weights in host memory while it saves; `whole`: of a run without parts."""
        weights, trained = _bytes(self.denoiser), _bytes(self.denoiser, trained=True)
        is_adapter = trained < weights
        spread = weights - trained if is_adapter else self.lasting
        own = self.lasting - spread + spread // self.num_ranks
        blocks = blocks_of(self.denoiser)
        outside = weights - sum(map(_bytes, blocks))
        fetched = outside + _AHEAD * max(map(_bytes, blocks)) if self.options.fsdp_reshard_after_forward else weights
        largest = max(_bytes(block, trained=not is_adapter) for block in blocks)
        gradients = 0 if is_adapter else 2 * max(largest, outside)
        beside = whole["step"] - self.lasting
        return {
            "step": own + fetched + gradients + beside,
            "validation": own + fetched + whole["validation"] - self.lasting,
            "save": own + whole["save"] - self.lasting + (0 if is_adapter else weights),
        }


def _bytes(module: nn.Module, *, trained: bool = False) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad or not trained)
