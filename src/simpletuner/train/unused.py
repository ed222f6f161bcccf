"""Libraries that a run has no use for. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_NAMED_BY = {"bitsandbytes": ("bnb-", "-bnb"), "torchao": ("ao-", "-torchao"), "optimum": ("quanto-", "-quanto")}
"""How the names of an optimizer (prefix) and of a precision (suffix) begin and end that need a library."""
_OF_ADAPTERS = ("peft", "lycoris")


def leave_out(config: Mapping[str, Any]) -> None:
    """Keep diffusers, peft and lycoris from importing them: they import all that they find.

    A third of a trainer's start. For a process of one run only, before its first import of torch: nothing
    imports them there afterwards.
    """
    names = [value for value in config.values() if isinstance(value, str)]
    unused = [
        library
        for library, (prefix, suffix) in _NAMED_BY.items()
        if not any(name.startswith(prefix) or name.endswith(suffix) for name in names)
    ]
    if config["memory_budget"] is not None and "optimum" in unused:
        unused.remove("optimum")  # the budget may choose to round the base
    if config["model_type"] == "full":
        unused += _OF_ADAPTERS
    modules: dict[str, Any] = sys.modules
    for library in unused:
        modules.setdefault(library, None)
