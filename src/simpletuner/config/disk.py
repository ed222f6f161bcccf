"""How little room on the output folder's disk is too little, and what is done then. training.md §2.7."""

from __future__ import annotations

import re
from collections.abc import Iterator

from simpletuner.config.situation import Situation, error_about, warning_about
from simpletuner.errors import Problem

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
DISK_OPTIONS = ("disk_low_threshold", "disk_low_action", "disk_low_script")


def parse_bytes(text: str) -> int | None:
    """`100G`, `512 MB`, `1.5TiB` or a number of bytes; units are powers of 1024. None for anything else."""
    match = _SIZE.fullmatch(text.strip())
    return None if match is None else int(float(match[1]) * _UNITS[match[2].upper()])


def disk_rule(at: Situation) -> Iterator[Problem]:
    threshold, action, script = (at.values[name] for name in DISK_OPTIONS)
    if threshold is not None and parse_bytes(threshold) is None:
        message = f"--disk_low_threshold is a size, not {threshold!r}."
        yield error_about("bad_value", "disk_low_threshold", message, "For example 100G, 512M, or a number of bytes.")
    if action == "script" and script is None:
        message = "--disk_low_action script needs --disk_low_script."
        yield error_about("incompatible_options", "disk_low_script", message, "Name the program to run.")
    if script is not None and action != "script":
        message = f"--disk_low_script has no effect: --disk_low_action is {action}."
        yield warning_about("option_no_effect", "disk_low_script", message)
    if threshold is None and at.given("disk_low_action"):
        message = "--disk_low_action has no effect: there is no --disk_low_threshold."
        yield warning_about("option_no_effect", "disk_low_action", message)
