"""What `--optimizer_release_gradients` goes with. training.md §2.3; docs/adr/0032."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.situation import Situation, error_about
from simpletuner.errors import Problem

IN_PARTS = ("adamw_bf16", "torch-adamw", "optimi-lion")
"""Optimizers of our own, whose step for one weight looks at no other."""
RELEASE_OPTIONS = (
    "optimizer_release_gradients", "gradient_accumulation_steps", "max_grad_norm", "grad_clip_method", "fsdp_enable",
)  # fmt: skip


def release_rule(at: Situation) -> Iterator[Problem]:
    """Each gradient is used and freed before the next one is there."""
    values = at.values
    if not values["optimizer_release_gradients"]:
        return
    if (count := values["gradient_accumulation_steps"]) > 1:
        yield error_about(
            "incompatible_options",
            "gradient_accumulation_steps",
            f"With --optimizer_release_gradients no gradient waits for others: it cannot be summed over {count} "
            "micro-batches.",
            "Set --gradient_accumulation_steps 1, with a larger --train_batch_size if it fits.",
        )
    if values["max_grad_norm"] and values["grad_clip_method"] == "norm":
        yield error_about(
            "incompatible_options",
            "max_grad_norm",
            f"With --optimizer_release_gradients gradients cannot be scaled to a norm of {values['max_grad_norm']:g}: "
            "the norm is known when the last of them is there, and the first are used by then.",
            "Set --max_grad_norm 0, or --grad_clip_method value, which limits each element.",
        )
    if values["fsdp_enable"]:
        yield error_about(
            "incompatible_options",
            "optimizer_release_gradients",
            "Gradients that are spread over ranks (--fsdp_enable) are not released one by one.",
            "Use one of the two.",
        )


def in_parts_rule(at: Situation) -> Iterator[Problem]:
    """Of an optimizer that there is."""
    name = at.values["optimizer"]
    if at.values["optimizer_release_gradients"] and name not in IN_PARTS:
        yield error_about(
            "incompatible_options",
            "optimizer",
            f"--optimizer_release_gradients is not built for --optimizer {name}, which steps all weights at once.",
            f"Use {', '.join(IN_PARTS[:-1])} or {IN_PARTS[-1]}.",
        )
