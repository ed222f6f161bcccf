"""What `memory_budget` may say. training.md §2.7, §10.4."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress

from simpletuner.config.situation import Situation, error_about
from simpletuner.errors import Problem

AUTO = "auto"
BUDGET_OPTIONS = ("memory_budget",)


def as_text(value: object) -> object:
    """A JSON number as it would be written; anything else as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def parse_budget(text: str) -> int | None:
    """Bytes of so many GB (10⁹ bytes); None for what is no positive number."""
    with suppress(ValueError):
        gigabytes = float(text)
        if math.isfinite(gigabytes) and gigabytes > 0:
            return round(gigabytes * 1e9)
    return None


def budget_rule(at: Situation) -> Iterator[Problem]:
    budget = at.values["memory_budget"]
    if budget not in (None, AUTO) and parse_budget(budget) is None:
        message = f"--memory_budget is `auto` or a number of GB, not {budget!r}."
        yield error_about("bad_value", "memory_budget", message, "For example auto, 24 or 79.5.")
