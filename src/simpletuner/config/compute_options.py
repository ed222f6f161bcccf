"""How the denoiser's blocks run: recomputed, compiled, with which kernel of attention. training.md §2.1, 2.11."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import PositiveInt

from simpletuner.config.option import OptionGroup, Ui
from simpletuner.config.situation import Situation, warning_about
from simpletuner.errors import Problem

Kept = Literal["nothing", "attention"]
Mechanism = Literal["diffusers", "cudnn", "flash", "efficient", "math"]


class ComputeOptions(OptionGroup):
    gradient_checkpointing: Annotated[bool, Ui(tab="hardware", order=10)] = True
    """Recompute activations in the backward pass: less memory, equal results."""

    gradient_checkpointing_interval: Annotated[PositiveInt | None, Ui(tab="hardware", order=11)] = None
    """Recompute every n-th block only, the first one first. Default: every block."""

    gradient_checkpointing_keeps: Annotated[Kept, Ui(tab="hardware", order=12)] = "nothing"
    """What of a recomputed block is kept all the same: `attention`, its dearest part, costs one activation each."""

    attention_mechanism: Annotated[Mechanism, Ui(tab="hardware", order=15)] = "diffusers"
    """Kernel of attention in training. `diffusers`: the fastest exact one, measured at the start on a GPU; a name of
    torch's own kernels forces that one, or fails."""

    dynamo_backend: Annotated[Literal["no", "inductor", "aot_eager", "eager"], Ui(tab="hardware", order=60)] = "no"
    """Compile each kind of the repeated blocks once. `inductor` is the fast one, the others are for finding faults."""

    dynamo_mode: Annotated[
        Literal["default", "max-autotune-no-cudagraphs"] | None, Ui(tab="hardware", order=61)
    ] = None  # fmt: skip
    """Of Inductor: `max-autotune-no-cudagraphs` tries more kernels and compiles for longer."""

    dynamo_fullgraph: Annotated[bool, Ui(tab="hardware", order=62)] = False
    """Fail where a block cannot be compiled as one graph, instead of running it in pieces."""

    dynamo_dynamic: Annotated[bool, Ui(tab="hardware", order=63)] = False
    """Compile for all sizes from the start; otherwise the second size that comes makes them so."""

    dynamo_use_regional_compilation: Annotated[bool, Ui(tab="hardware", order=64, later=True)] = True
    """Compile the repeated blocks, not the denoiser as a whole."""


RECOMPUTE_OPTIONS = ("gradient_checkpointing_interval", "gradient_checkpointing_keeps")
COMPILE_OPTIONS = ("dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic")


def compute_rule(at: Situation) -> Iterator[Problem]:
    """A budget may switch recomputing on: there the options of it have an effect."""
    if not at.values["gradient_checkpointing"] and at.values["memory_budget"] is None:
        for name in RECOMPUTE_OPTIONS:
            if at.given(name):
                message = f"--{name} has no effect: --gradient_checkpointing is false."
                yield warning_about("option_no_effect", name, message)
    backend = at.values["dynamo_backend"]
    for name in COMPILE_OPTIONS:
        if at.given(name) and (backend == "no" or (name == "dynamo_mode" and backend != "inductor")):
            yield warning_about("option_no_effect", name, f"--{name} has no effect: --dynamo_backend is {backend}.")
