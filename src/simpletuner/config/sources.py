"""Where option values come from: an object, a form, a command line. Each becomes a `Layer` of bare names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from simpletuner.config.json_text import read_json
from simpletuner.config.option import OptionField
from simpletuner.config.reserved import LATER, NEGATED, NO_EFFECT, OLD_VALUES, RENAMED, is_later
from simpletuner.errors import Level, Problem, UserError

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_UI_NAME = re.compile(r"^__.*__$")


class NotGiven:
    """Marks a value that is as good as absent."""


NOT_GIVEN = NotGiven()


@dataclass(frozen=True, slots=True)
class Layer:
    """Values as they were written, by bare option name, and what was wrong with the names."""

    name: str
    values: Mapping[str, Any]
    problems: tuple[Problem, ...] = ()
    is_text: bool = False
    """Values are strings of a form, a command line or a `.env` file."""


@dataclass(slots=True)
class _Reader:
    name: str
    known: Mapping[str, OptionField]
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    problems: list[Problem] = field(default_factory=list[Problem])

    def warn(self, code: str, option: str, message: str, hint: str = "") -> None:
        self._note(code, option, message, hint, Level.WARNING)

    def fail(self, code: str, option: str, message: str, hint: str = "") -> None:
        self._note(code, option, message, hint, Level.ERROR)

    def _note(self, code: str, option: str, message: str, hint: str, level: Level) -> None:
        pointer = f"/--{option}"
        self.problems.append(
            Problem(code=code, option=option, message=message, hint=hint, pointer=pointer, level=level)
        )

    def take(self, written: str, value: Any) -> None:
        """File one pair under its bare, current name."""
        option = written.removeprefix("--")
        if option in NEGATED and parse_boolean(value) is True:
            # It asks for what is so anyway: the option of the opposite meaning is off.
            self._old_name(option)
            return
        if option in RENAMED or option in NEGATED:
            self._old_name(option)
            value = True if option in NEGATED and parse_boolean(value) is False else value
            option = RENAMED.get(option) or NEGATED[option]
        value = self._new_value(option, value)
        if option in NO_EFFECT:
            self.warn("option_no_effect", option, f"--{option} has no effect: {NO_EFFECT[option]}.")
        elif option in self.known:
            self.values[option] = value
        elif is_later(option):
            self.fail("option_not_supported_yet", option, f"The option --{option} is not supported yet.")
        else:
            self.fail("unknown_field", option, f"Unknown option --{option}.", self._guess(option))

    def _old_name(self, option: str) -> None:
        if option in RENAMED:
            new = RENAMED[option]
            self.warn("legacy_option", option, f"--{option} is the old name of --{new}.", f"Write --{new}.")
        else:
            message = f"--{option} is the old opposite of --{NEGATED[option]}."
            self.warn("legacy_option", option, message, f"Write --{NEGATED[option]}.")

    def _new_value(self, option: str, value: Any) -> Any:
        new = OLD_VALUES.get(option, {}).get(str(value))
        if new is None:
            return value
        self.warn("legacy_option", option, f"{value!r} is the old name of --{option} {new}.", f"Write {new}.")
        return new

    def _guess(self, option: str) -> str:
        near = get_close_matches(option, [*self.known, *LATER, *RENAMED], n=1, cutoff=0.75)
        return f"Did you mean --{near[0]}?" if near else ""


def layer_from_mapping(
    values: Mapping[str, Any], *, name: str, known: Mapping[str, OptionField], is_text: bool = False
) -> Layer:
    """From a JSON object. The dashed spelling wins over the bare one; the user interface's own keys are obeyed."""
    reader = _Reader(name, known)
    disabled = {part.strip().removeprefix("--") for part in str(values.get("__disabled_fields__", "")).split(",")}
    for written, value in values.items():
        if _UI_NAME.match(written):
            if written not in ("__active_tab__", "__disabled_fields__"):
                reader.fail("unknown_field", written, f"Unknown field {written}.")
            continue
        bare = written.removeprefix("--")
        if bare in disabled:
            continue
        if bare == written and f"--{bare}" in values:
            reader.warn("duplicate_option", bare, f"--{bare} and {bare} are both given; --{bare} is used.")
            continue
        reader.take(written, value)
    return Layer(name, reader.values, tuple(reader.problems), is_text)


def layer_from_pairs(pairs: Iterable[tuple[str, str]], *, name: str, known: Mapping[str, OptionField]) -> Layer:
    """From form fields: text values; the last of a repeated field wins, with a warning."""
    values: dict[str, str] = {}
    repeated: list[Problem] = []
    for written, value in pairs:
        if written in values:
            option = written.removeprefix("--")
            message = f"{written} is given more than once; the last value is used."
            repeated.append(
                Problem(
                    code="duplicate_option", option=option, message=message, pointer=f"/{written}", level=Level.WARNING
                )
            )
        values[written] = value
    layer = layer_from_mapping(values, name=name, known=known, is_text=True)
    return Layer(name, layer.values, (*repeated, *layer.problems), is_text=True)


def layer_from_argv(words: Sequence[str], *, name: str, known: Mapping[str, OptionField]) -> Layer:
    return layer_from_pairs(split_argv(words, known), name=name, known=known)


def split_argv(words: Sequence[str], known: Mapping[str, OptionField]) -> list[tuple[str, str]]:
    """The pairs of `key=value`, `--key=value`, `--key value` and bare `--flag` words."""
    pairs: list[tuple[str, str]] = []
    waiting: str | None = None
    for word in words:
        if waiting is not None and not word.startswith("--") and word.partition("=")[0] not in known:
            pairs.append((waiting, word))
            waiting = None
            continue
        if waiting is not None:
            pairs.append((waiting, "true"))
            waiting = None
        key, equals, value = word.partition("=")
        if equals:
            pairs.append((key, value))
        else:
            waiting = key
    if waiting is not None:
        pairs.append((waiting, "true"))
    return pairs


def parse_boolean(raw: Any) -> bool | None:
    """`true false 1 0 yes no on off` in any case; None for anything else."""
    if isinstance(raw, bool):
        return raw
    text = str(raw).strip().lower()
    if text in _TRUE:
        return True
    return False if text in _FALSE else None


def parse_value(option: OptionField, raw: Any, *, is_text: bool) -> tuple[Any, Problem | None]:
    """The typed value of what was written, NOT_GIVEN for an empty string without meaning, or a problem."""
    if isinstance(raw, str) and raw.strip() == "" and option.kind != "string":
        return (None if option.nullable else option.ui.off if option.ui.off is not None else NOT_GIVEN), None
    if raw == "" and option.kind == "string":
        return (None if option.nullable else raw if option.ui.off == "" else option.ui.off or NOT_GIVEN), None
    prepared, problem = _prepare(option, raw, is_text=is_text)
    if problem is not None:
        return NOT_GIVEN, problem
    try:
        return option.adapter().validate_python(prepared), None
    except ValidationError as error:
        return NOT_GIVEN, _bad_value(option, raw, error)


def _prepare(option: OptionField, raw: Any, *, is_text: bool) -> tuple[Any, Problem | None]:
    """Bring the text of a boolean, a number or a structure to the Python value that the type expects."""
    kind = option.kind
    if kind == "boolean":
        value = parse_boolean(raw)
        if value is None:
            return None, _problem(
                option, "bad_boolean", f"--{option.name} is on or off, not {raw!r}.", "Write true or false."
            )
        return value, None
    if kind in ("integer", "number"):
        if isinstance(raw, bool):
            return None, _problem(option, "bad_value", f"--{option.name} is a number, not {raw!r}.", "")
        if isinstance(raw, str) and "_" in raw:
            return None, _problem(option, "bad_value", f"--{option.name} is a number, not {raw!r}.", option.help)
        return (raw.strip() if isinstance(raw, str) else raw), None
    if kind == "structured" and isinstance(raw, str) and raw.lstrip()[:1] in ("{", "["):
        try:
            return read_json(raw, name=f"--{option.name}")[0], None
        except UserError as error:
            hint = error.hint or "Quote the whole value, and names with double quotes."
            return None, _problem(option, "bad_json", error.message, hint)
    if kind == "structured" and is_text and isinstance(raw, str) and raw.isdecimal():
        return int(raw), None
    return raw, None


def _bad_value(option: OptionField, raw: Any, error: ValidationError) -> Problem:
    if option.choices:
        near = get_close_matches(str(raw), option.choices, n=1)
        guess = f"Did you mean {near[0]}? " if near else ""
        listed = ", ".join(option.choices)
        return _problem(option, "bad_choice", f"--{option.name} cannot be {raw!r}.", f"{guess}It is one of: {listed}.")
    reason = error.errors()[0]["msg"]
    return _problem(option, "bad_value", f"--{option.name} cannot be {raw!r}: {reason}.", option.help)


def _problem(option: OptionField, code: str, message: str, hint: str) -> Problem:
    return Problem(code=code, option=option.name, message=message, hint=hint, pointer=f"/--{option.name}")


UNWRITTEN = frozenset({"default", "flavour"})
"""Layers whose values nobody wrote: they are made anew, and may be chosen."""


def written_options(provenance: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
    """Names of the options that somebody set, of a frozen `provenance`."""
    return frozenset(name for name, origin in provenance.items() if origin["layer"] not in UNWRITTEN)
