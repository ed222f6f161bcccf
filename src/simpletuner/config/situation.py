"""What rules look at, and how they complain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.config.directories import Directories
from simpletuner.errors import Level, Problem
from simpletuner.families.spec import FamilySpec


@dataclass(frozen=True, slots=True)
class Situation:
    """What the rules look at: typed values by bare name, the layer of each, the datasets, the family."""

    values: Mapping[str, Any]
    layers: Mapping[str, str]
    datasets: list[dict[str, Any]]
    pointers: list[str]
    """The JSON pointer of each dataset."""
    broken: frozenset[str]
    """Options whose own value is wrong, and `datasets` when an entry is: what rests on them is not judged."""
    spec: FamilySpec
    directories: Directories
    for_start: bool

    def given(self, name: str) -> bool:
        """Whether a person set it, in an environment or a request."""
        return self.layers.get(name, "default") not in ("default", "flavour")

    @property
    def guard_level(self) -> Level:
        """Of a guard of the family: what it warns of can be wanted by those who know what they do."""
        return Level.WARNING if self.values["i_know_what_i_am_doing"] else Level.ERROR


def error_about(code: str, option: str, message: str, hint: str = "") -> Problem:
    return Problem(code=code, option=option, message=message, hint=hint, pointer=f"/--{option}")


def warning_about(code: str, option: str, message: str, hint: str = "") -> Problem:
    return Problem(code=code, option=option, message=message, hint=hint, pointer=f"/--{option}", level=Level.WARNING)
