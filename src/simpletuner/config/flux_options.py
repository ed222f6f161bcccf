"""What only Flux knows: its embedded guidance, and schnell's four noise levels. training.md §2.5."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeFloat

from simpletuner.config.option import OptionGroup, Ui


class FluxOptions(OptionGroup):
    flux_lora_target: Annotated[
        Literal[
            "all", "mmdit", "context", "context+ffs", "all+ffs", "all+ffs+embedder", "ai-toolkit", "tiny", "nano"
        ],
        Ui(tab="model", order=46),
    ] = "all"  # fmt: skip
    """Modules that a Flux LoRA is put on (`lora_type` standard)."""

    flux_guidance_mode: Annotated[Literal["constant", "random-range"], Ui(tab="training", order=70)] = "constant"
    """Guidance that the network is told while it trains: one value, or one per sample from a range."""

    flux_guidance_value: Annotated[NonNegativeFloat, Ui(tab="training", order=71)] = 1.0
    """The value of `constant`."""

    flux_guidance_min: Annotated[NonNegativeFloat, Ui(tab="training", order=72)] = 0.0
    """Least value of `random-range`."""

    flux_guidance_max: Annotated[NonNegativeFloat, Ui(tab="training", order=73)] = 4.0
    """Greatest value of `random-range`."""

    flux_fast_schedule: Annotated[bool, Ui(tab="training", order=74)] = False
    """Train at schnell's four noise levels only: 1, 0.75, 0.5, 0.25."""
