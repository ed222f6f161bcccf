"""Weights spread over the ranks of a run. training.md §2.11; docs/adr/0031."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from simpletuner.config.model_options import QUANTISED
from simpletuner.config.option import OptionGroup, Ui
from simpletuner.config.situation import Situation, error_about, warning_about
from simpletuner.errors import Problem


class FsdpOptions(OptionGroup):
    fsdp_enable: Annotated[bool, Ui(tab="hardware", order=70)] = False
    """Spread weights, gradients and optimizer over the ranks (FSDP2); of an adapter's run the frozen base."""

    fsdp_version: Annotated[Literal[2, 1], Ui(tab="hardware", order=71, later=True)] = 2
    """2; version 1 is not built."""

    fsdp_reshard_after_forward: Annotated[bool, Ui(tab="hardware", order=72)] = True
    """Give a block's weights back after its forward pass and fetch them again for the backward one."""

    fsdp_state_dict_type: Annotated[
        Literal["SHARDED_STATE_DICT", "FULL_STATE_DICT"], Ui(tab="hardware", order=73, later=True)
    ] = "SHARDED_STATE_DICT"
    """Each rank writes its part of the optimizer's state. Weights are always written whole, for other programs."""

    fsdp_auto_wrap_policy: Annotated[
        Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"], Ui(tab="hardware", order=74, later=True)
    ] = "TRANSFORMER_BASED_WRAP"  # fmt: skip
    """What is fetched at once: one of the repeated blocks."""

    fsdp_transformer_layer_cls_to_wrap: Annotated[str | None, Ui(tab="hardware", order=75)] = None
    """Classes of those blocks, separated by commas. Default: all blocks that the model repeats."""

    fsdp_cpu_offload: Annotated[bool, Ui(tab="hardware", order=76, later=True)] = False
    """Keep the parts in host memory between steps."""


FSDP_OPTIONS = ("fsdp_enable",)
_ELEMENTWISE = ("adamw_bf16", "torch-adamw")
"""Optimizers whose step for one weight does not look at another's."""


def fsdp_rule(at: Situation) -> Iterator[Problem]:
    values = at.values
    if not values["fsdp_enable"]:
        for name in FsdpOptions.model_fields:
            if name != "fsdp_enable" and at.given(name):
                yield warning_about("option_no_effect", name, f"--{name} has no effect: --fsdp_enable is false.")
        return
    if values["num_processes"] == 1:
        message = "There is nothing to spread: --num_processes is 1."
        yield error_about("incompatible_options", "fsdp_enable", message, "Set --num_processes to the number of GPUs.")
    if values["base_model_precision"] in QUANTISED:
        message = f"A base in {values['base_model_precision']} cannot be spread over ranks."
        yield error_about("incompatible_options", "fsdp_enable", message, "Use --base_model_precision bf16.")
    if values["memory_budget"] is not None:
        message = "--memory_budget does not choose for weights that are spread over ranks yet."
        yield error_about("option_not_supported_yet", "memory_budget", message, "Leave it out with --fsdp_enable.")
    if values["dynamo_backend"] != "no":
        message = "Blocks that are spread over ranks cannot be compiled yet."
        yield error_about("option_not_supported_yet", "dynamo_backend", message, "Leave it out with --fsdp_enable.")


def parts_rule(at: Situation) -> Iterator[Problem]:
    """Of an optimizer that there is."""
    values = at.values
    if values["fsdp_enable"] and values["model_type"] == "full" and values["optimizer"] not in _ELEMENTWISE:
        message = f"--optimizer {values['optimizer']} is not built for weights that are spread over ranks."
        hint = f"Use {' or '.join(_ELEMENTWISE)}, or train an adapter."
        yield error_about("option_not_supported_yet", "optimizer", message, hint)
