"""The memory that a run was found to need, phase by phase, against what there is. training.md §9, §10.4."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from simpletuner.errors import ExitCode, UserError

Phase = Literal["text", "latents", "step", "validation", "save"]

_DEVICE = {"cpu": "machine", "cuda": "GPU", "mps": "GPU"}
_CHEAPER: dict[Phase, str] = {
    "text": "Lower --text_encoder_batch_size, or use a machine that holds the text encoders.",
    "latents": "Lower --vae_batch_size or --resolution.",
    "step": "Lower --train_batch_size and raise --gradient_accumulation_steps, set --gradient_checkpointing true, "
    "or train an adapter over --base_model_precision int8-quanto.",
    "validation": "Lower --validation_resolution, or set --validation_disable true.",
    "save": "Train an adapter, or choose an optimizer with a smaller state.",
}


@dataclass(slots=True)
class MemoryPlan:
    """Predicted peaks. On a CPU device and host are one, and what the process held before counts too."""

    phases: dict[Phase, int]
    device: torch.device
    held_bytes: int
    """Of this process before its first phase: interpreter, libraries."""
    limit_bytes: int
    """What the device has."""
    may_refuse: bool = True
    budget_bytes: int | None = None
    """Of `memory_budget`."""
    choice: dict[str, Any] = field(default_factory=dict[str, Any])
    """Bare option → value, as chosen for the budget."""
    entered: set[Phase] = field(default_factory=set[Phase])

    def predicted_bytes(self, *phases: Phase) -> int:
        """The peak over `phases`; over those that were entered when none is named."""
        base = self.held_bytes if self.device.type == "cpu" else 0
        return base + max((self.phases[phase] for phase in phases or self.entered), default=0)

    def enter(self, *phases: Phase) -> None:
        """Say that these phases are coming.

        Raises UserError `will_not_fit` (71) for one that has no room, `budget_too_small` (71) for one above the budget.
        """
        self.entered.update(phases)
        for phase in phases:
            if (needed := self.predicted_bytes(phase)) > self.limit_bytes and self.may_refuse:
                raise UserError(
                    "will_not_fit",
                    f"The phase {phase!r} needs {gigabytes(needed)}; this {_DEVICE[self.device.type]} has "
                    f"{gigabytes(self.limit_bytes)}.",
                    hint=_CHEAPER[phase] + " --i_know_what_i_am_doing true tries it all the same.",
                    exit_code=ExitCode.OUT_OF_MEMORY,
                )

            if self.budget_bytes is not None and needed > self.budget_bytes and self.may_refuse:
                raise UserError(
                    "budget_too_small",
                    f"The phase {phase!r} needs {gigabytes(needed)}, more than the budget of "
                    f"{gigabytes(self.budget_bytes)}.",
                    hint=_CHEAPER[phase] + " Or raise --memory_budget.",
                    pointer="/--memory_budget",
                    exit_code=ExitCode.OUT_OF_MEMORY,
                )

    def as_facts(self) -> dict[str, Any]:
        return {
            "device": self.device.type,
            "phases": {phase: self.predicted_bytes(phase) for phase in self.phases},
            "predicted_bytes": self.predicted_bytes(),
            "held_bytes": self.held_bytes,
            "limit_bytes": self.limit_bytes,
            "budget_bytes": self.budget_bytes,
            "choice": dict(self.choice),
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {gigabytes(self.predicted_bytes(phase))}" for phase in self.phases)
        return f"Predicted memory peaks: {parts}; there are {gigabytes(self.limit_bytes)}."


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
