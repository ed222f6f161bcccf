"""The families, each listed once. A specification is imported when its name is asked for."""

from __future__ import annotations

import importlib
from difflib import get_close_matches

from simpletuner.errors import UserError
from simpletuner.families.spec import FamilySpec

SPECS: dict[str, str] = {
    "pixart_sigma": "simpletuner.families.pixart_sigma.spec:SPEC",
    "flux": "simpletuner.families.flux.spec:SPEC",
}

LATER = ("sdxl", "sd3", "flux2", "z_image", "qwen_image", "wan")
"""Families of the contract that are not built yet."""


def family_names() -> tuple[str, ...]:
    return tuple(SPECS)


def load_spec(name: str) -> FamilySpec:
    """Raises UserError `unknown_family`, or `option_not_supported_yet` for a family that is still to come."""
    pointer = "/--model_family"
    if name in LATER:
        raise UserError(
            "option_not_supported_yet",
            f"The model family {name!r} is not supported yet.",
            hint=f"Supported now: {', '.join(SPECS)}.",
            pointer=pointer,
        )
    if name not in SPECS:
        near = get_close_matches(name, [*SPECS, *LATER], n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(
            "unknown_family",
            f"There is no model family {name!r}.",
            hint=f"{guess}Known: {', '.join(SPECS)}.",
            pointer=pointer,
        )
    module, _, attribute = SPECS[name].partition(":")
    spec = vars(importlib.import_module(module))[attribute]
    if not isinstance(spec, FamilySpec):
        raise TypeError(f"{SPECS[name]} is not a FamilySpec")
    return spec
