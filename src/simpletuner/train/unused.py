"""Quantisation libraries that a run has no use for. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_MARKS = {"bitsandbytes": ("bnb-", "-bnb"), "torchao": ("ao-", "-torchao")}
"""How the names of an optimizer (prefix) and of a precision (suffix) begin and end that need a library."""


def leave_out(config: Mapping[str, Any]) -> None:
    """Keep diffusers and peft from importing them: they import all that they find, a fifth of a trainer's start.

    For a process of one run only, before its first import of torch: nothing imports them there afterwards.
    """
    modules: dict[str, Any] = sys.modules
    for library, (prefix, suffix) in _MARKS.items():
        names = [value for value in config.values() if isinstance(value, str)]
        if not any(name.startswith(prefix) or name.endswith(suffix) for name in names):
            modules.setdefault(library, None)
