"""JSON as people write it: the last of two equal keys wins, and both are reported with their line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from simpletuner.errors import Level, Problem, UserError

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


@dataclass(frozen=True, slots=True)
class DuplicateKey:
    pointer: str
    key: str
    line: int
    texts: tuple[str, ...]
    """The JSON text of each scalar value given to the key, in order; objects and lists count by their bracket."""


def read_json(text: str, *, name: str) -> tuple[Any, list[DuplicateKey]]:
    """Parse. Raises UserError `bad_json` with line and column; NaN and Infinity are refused.

    The mark that editors of Windows put first is left out.
    """
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise UserError("bad_json", f"{name} is empty.", hint="An empty list is [], an empty object {}.")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        message = f"{name} is not valid JSON: {error.msg} at {place}."
        raise UserError("bad_json", message, hint=_cure(error)) from error
    except ValueError as error:
        raise UserError("bad_json", f"{name} is not valid JSON: {error}.") from error
    return value, list(find_duplicates(text))


def _cure(error: json.JSONDecodeError) -> str:
    """What was most likely meant at the place where reading ended."""
    before, after = error.doc[: error.pos].rstrip()[-1:], error.doc[error.pos :].lstrip()
    if error.msg.startswith("Invalid \\escape"):
        return "Write a backslash twice, or / in paths."
    if error.msg == "Extra data":
        return "Something follows its end: put all of it into one list, [ …, … ]."
    if after.startswith(("//", "#", "/*")):
        return "JSON has no comments: remove it."
    if before == "," and after[:1] in ("]", "}"):
        return f"Remove the comma before the {after[0]}."
    if word := re.match(r"True|False|None|nan", after):
        return f"Write {'null' if word[0] in ('None', 'nan') else word[0].lower()}, not {word[0]}."
    if after.startswith("'") or error.msg.startswith("Expecting property name"):
        return "Names and texts stand in double quotes."
    if error.msg == "Expecting ',' delimiter":
        return "A comma is missing before this place, or a bracket after it."
    if not after:
        return "It ends too early: a bracket or a quote is not closed."
    return ""


def duplicate_problems(duplicates: list[DuplicateKey], *, name: str, prefix: str = "") -> list[Problem]:
    """A warning for each doubled key; an error where two different `id` claim one entry."""
    problems: list[Problem] = []
    for twice in duplicates:
        conflict = twice.key == "id" and len(set(twice.texts)) > 1
        problems.append(
            Problem(
                code="duplicate_key",
                message=f"{name}, line {twice.line}: the key {twice.key!r} is given {len(twice.texts)} times"
                + (" with different values." if conflict else "; the last one wins."),
                hint="Give each entry one id." if conflict else "Remove the earlier one.",
                pointer=prefix + twice.pointer,
                level=Level.ERROR if conflict else Level.WARNING,
            )
        )
    return problems


@dataclass(slots=True)
class _Frame:
    is_object: bool
    pointer: str
    key: str | None = None
    index: int = 0
    seen: dict[str, list[tuple[int, str]]] = field(default_factory=dict[str, list[tuple[int, str]]])

    def child_pointer(self) -> str:
        step = _escape(self.key or "") if self.is_object else str(self.index)
        return f"{self.pointer}/{step}"


def find_duplicates(text: str) -> Iterator[DuplicateKey]:
    """Doubled keys of valid JSON text, by a scan of its tokens."""
    frames: list[_Frame] = []
    line, scanned = 1, 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        line += text.count("\n", scanned, match.start())
        scanned = match.start()
        frame = frames[-1] if frames else None
        if token in "}]":
            yield from _close(frames.pop())
        elif token == ",":
            if frame is not None:
                frame.key, frame.index = None, frame.index + 1
        elif token == ":":
            continue
        elif frame is not None and frame.is_object and frame.key is None:
            frame.key = json.loads(token)
            frame.seen.setdefault(str(frame.key), []).append((line, ""))
        else:
            if frame is not None and frame.is_object:
                places = frame.seen[str(frame.key)]
                places[-1] = (places[-1][0], token)
            if token in "{[":
                frames.append(_Frame(token == "{", frame.child_pointer() if frame else ""))


def _close(frame: _Frame) -> Iterator[DuplicateKey]:
    for key, places in frame.seen.items():
        if len(places) > 1:
            yield DuplicateKey(f"{frame.pointer}/{_escape(key)}", key, places[-1][0], tuple(text for _, text in places))


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
