"""What `accelerate_visible_devices` may say. api.md §4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from simpletuner.config.situation import Situation, error_about, warning_about
from simpletuner.errors import Problem

DEVICE_OPTIONS = ("accelerate_visible_devices", "num_processes")


def joined(value: object) -> object:
    """A list, or the text of one, as `0,1`."""
    if isinstance(value, list):
        value = ",".join(str(part) for part in cast(list[object], value))
    return value.strip("[]").replace(" ", "") if isinstance(value, str) else value


def read_numbers(text: str | None) -> tuple[int, ...]:
    """Each counts once. Raises ValueError for what is no list of numbers."""
    parts = [] if not text else text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r} is no list of device numbers")
    return tuple(dict.fromkeys(int(part) for part in parts))


def device_rule(at: Situation) -> Iterator[Problem]:
    option = "accelerate_visible_devices"
    text, needed = at.values[option], at.values["num_processes"]
    try:
        numbers = read_numbers(text)
    except ValueError:
        yield error_about("bad_value", option, f"--{option} is not a list of device numbers: {text!r}.", "Like 0,1.")
        return
    if numbers and len(numbers) < needed:
        message = f"--{option} names {len(numbers)} of the {needed} devices that --num_processes needs: it is ignored."
        yield warning_about("too_few_devices", option, message, "Name as many devices, or lower --num_processes.")
