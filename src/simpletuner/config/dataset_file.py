"""Reads the dataset file into checked entries, naming every mistake with its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from simpletuner.config.dataset_options import (
    FOLLOWS_SOURCE,
    INHERITED,
    KNOWN_DATASET_TYPES,
    KNOWN_TYPES,
    LATER_KEYS,
    MODELS,
    NO_EFFECT_KEYS,
    dataset_kind,
)
from simpletuner.config.directories import Directories, expand_placeholders
from simpletuner.config.json_text import duplicate_problems, read_json
from simpletuner.config.sources import parse_boolean
from simpletuner.config.storage_options import KEYS_OF_TYPE, SECRET_KEYS, keys_of_other_types
from simpletuner.config.storage_rules import check_keys, default_strategy
from simpletuner.errors import Level, Problem, UserError

_BOOLEANS = frozenset(
    {"disabled", "crop", "prepend_instance_prompt", "only_instance_prompt", "disable_multiline_split", "default"}
)


def read_dataset_file(shown: str, directories: Directories) -> tuple[list[Any], list[Problem]]:
    """The raw list and the warnings about its text. `shown` is the path as the person wrote it."""
    path, pointer = directories.locate(shown), "/--data_backend_config"
    if not path.is_file():
        raise UserError(
            "data_backend_config_missing",
            f"The dataset file {shown!r} does not exist.",
            hint=f"It is looked for as {' and as '.join(map(str, directories.candidates(shown)))}.",
            pointer=pointer,
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("bad_json", f"{shown} is not UTF-8 text.", pointer=pointer) from error
    value, duplicates = read_json(text, name=shown)
    if not isinstance(value, list):
        hint = _cure_of_no_list(value)
        raise UserError("bad_dataset_file", f"{shown} holds no list of datasets.", hint=hint, pointer=pointer)
    return cast(list[Any], value), duplicate_problems(duplicates, name=shown, prefix="/datasets")


def _cure_of_no_list(value: object) -> str:
    if isinstance(value, dict):
        found = cast(dict[str, Any], value)
        if "id" in found or "instance_data_dir" in found:
            return "Put [ and ] around it."
        lists = [key for key, inner in found.items() if isinstance(inner, list)]
        if lists:
            return f"The file is the list itself: write only what stands in {lists[0]!r}."
    return "Write [ {…}, {…} ]."


@dataclass(slots=True)
class DatasetEntries:
    """Entries as `Dataset` takes them, and the JSON pointer of each; those with an error are left out."""

    entries: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    pointers: list[str] = field(default_factory=list[str])
    problems: list[Problem] = field(default_factory=list[Problem])


def resolve_datasets(
    entries: list[Any], options: Mapping[str, Any], directories: Directories, family: str
) -> DatasetEntries:
    """Every key filled from the options, every path absolute. `options` are resolved values by bare name."""
    found = DatasetEntries()
    for index, entry in enumerate(entries):
        reader = _EntryReader(f"/datasets/{index}", options, directories, family)
        if filled := reader.read(entry):
            found.entries.append(filled)
            found.pointers.append(f"/datasets/{index}")
        found.problems += reader.problems
    found.problems += _check_ids(entries)
    _settle_text_embeds(found, options, directories)
    return found


def _cure_of_value(detail: ErrorDetails) -> str:
    if detail["type"] in ("float_parsing", "int_parsing"):
        number = re.match(r"\s*(\d+)", str(detail["input"]))
        return f"Write a number alone, such as {number[1]}." if number else "Write a number alone."
    if detail["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))
        near = get_close_matches(str(detail["input"]), choices, n=1)
        return f"Did you mean {near[0]!r}?" if near else ""
    return ""


class _EntryReader:
    def __init__(self, pointer: str, options: Mapping[str, Any], directories: Directories, family: str) -> None:
        self._pointer = pointer
        self._options = options
        self._directories = directories
        self._family = family
        self.problems: list[Problem] = []

    def read(self, entry: Any) -> dict[str, Any] | None:
        if not isinstance(entry, dict):
            hint = "Remove one pair of [ ]." if isinstance(entry, list) else 'Write {"id": …, "instance_data_dir": …}.'
            self._fail("bad_dataset", "A dataset is an object.", hint)
            return None
        written = self._expand(cast(dict[str, Any], entry))
        kind = dataset_kind(written)
        if written.get("conditioning_type") == "controlnet":
            self._refuse("controlnet", ("controlnet",), "conditioning_type")
            return None
        if not self._check_kinds(kind, str(written.get("type", "local"))):
            return None
        model = MODELS[kind]
        if kind != "text_embeds" and (problems := list(check_keys(written, self._pointer))):
            self.problems += problems
            return None
        taken = {key: value for key, value in written.items() if self._take_key(key, set(model.model_fields))}
        values = {key: value for key, value in taken.items() if value is not None and value != ""}
        if "disable" in values:
            values["disabled"] = values.pop("disable")
        self._parse_booleans(values)
        if kind == "conditioning":
            values = self._follow_source(values) | {"dataset_type": kind}
        self._fill(values, set(model.model_fields))
        try:
            others = keys_of_other_types(str(values.get("type", "local")))
            return model.model_validate(values).model_dump(mode="json", exclude=others)
        except ValidationError as error:
            for detail in error.errors():
                key = str(detail["loc"][0]) if detail["loc"] else ""
                missing_key = detail["type"] == "missing"
                message = (
                    f"{key!r} is missing." if missing_key else f"{key!r}: {detail['msg']}, not {detail['input']!r}."
                )
                hint = "" if missing_key else _cure_of_value(detail)
                self._fail("missing_dataset_key" if missing_key else "bad_value", message, hint, key)
            return None

    def _expand(self, entry: dict[str, Any]) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for key, value in entry.items():
            expanded, missing = expand_placeholders(value)
            written[key] = value if key in SECRET_KEYS else expanded
            for name in missing:
                hint = "Set it before the job is started."
                self._fail("env_not_set", f"The variable {name} is not set.", hint, key)
        return written

    def _check_kinds(self, kind: str, backend: str) -> bool:
        if kind not in MODELS:
            self._refuse(kind, KNOWN_DATASET_TYPES, "dataset_type")
        if kind == "text_embeds" and backend in KEYS_OF_TYPE and backend != "local":
            self._fail("bad_choice", "A cache of text is a folder of this machine.", 'Remove "type".', "type")
            return False
        if backend not in KEYS_OF_TYPE:
            self._refuse(backend, KNOWN_TYPES, "type")
        return kind in MODELS and backend in KEYS_OF_TYPE

    def _refuse(self, value: str, known: tuple[str, ...], key: str) -> None:
        if value in known:
            self._fail("option_not_supported_yet", f"{key} {value!r} is not supported yet.", "", key)
            return
        near = get_close_matches(value, known, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        self._fail("bad_choice", f"{key} cannot be {value!r}.", f"{guess}It is one of: {', '.join(known)}.", key)

    def _take_key(self, key: str, fields: set[str]) -> bool:
        if key in fields or key == "disable":
            return True
        if key in NO_EFFECT_KEYS:
            message = f"{key!r} has no effect: {NO_EFFECT_KEYS[key]}."
            self._note("option_no_effect", message, "", key, Level.WARNING)
        elif key in LATER_KEYS:
            self._fail("option_not_supported_yet", f"The dataset key {key!r} is not supported yet.", "", key)
        else:
            near = get_close_matches(key, [*fields, *LATER_KEYS], n=1)
            self._fail(
                "unknown_dataset_key",
                f"Unknown dataset key {key!r}.",
                f"Did you mean {near[0]!r}?" if near else "",
                key,
            )
        return False

    def _parse_booleans(self, values: dict[str, Any]) -> None:
        for key in _BOOLEANS & values.keys():
            parsed = parse_boolean(values[key])
            if parsed is None:
                self._fail(
                    "bad_boolean", f"{key!r} is true or false, not {values[key]!r}.", "Write true or false.", key
                )
                del values[key]
            else:
                values[key] = parsed

    def _follow_source(self, values: dict[str, Any]) -> dict[str, Any]:
        for key in [key for key in FOLLOWS_SOURCE if key in values]:
            message = f"{key!r} has no effect: a conditioning set follows the dataset that names it."
            self._note("option_no_effect", message, "", key, Level.WARNING)
        return {key: value for key, value in values.items() if key not in FOLLOWS_SOURCE}

    def _fill(self, values: dict[str, Any], fields: set[str]) -> None:
        if values.get("dataset_type") == "eval":
            # A held-out loss is of the pictures as they are described: captions are not dropped unless asked for.
            values.setdefault("caption_dropout_probability", 0.0)
        is_conditioning = values.get("dataset_type") == "conditioning"
        if "caption_strategy" in fields and not is_conditioning and (own := default_strategy(values.get("type", ""))):
            values.setdefault("caption_strategy", own)
        for key in INHERITED:
            if is_conditioning and key in FOLLOWS_SOURCE:
                continue
            if key in fields and key not in values and self._options.get(key) is not None:
                values[key] = self._options[key]
        name = str(values.get("id", ""))
        if "cache_dir_vae" in fields and "cache_dir_vae" not in values:
            values["cache_dir_vae"] = default_latent_folder(self._options, self._family, name)
        if "cache_dir" in fields and "cache_dir" not in values:
            values["cache_dir"] = self._options.get("cache_dir_text", "cache")
        if values.get("type") == "csv":
            values.setdefault("csv_cache_dir", default_download_folder(self._options, name))
            values["csv_file"] = str(self._directories.locate(values["csv_file"]))
        for key in ("instance_data_dir", "cache_dir_vae", "cache_dir", "csv_cache_dir"):
            if isinstance(values.get(key), str):
                values[key] = self._directories.absolute(values[key])

    def _fail(self, code: str, message: str, hint: str, key: str = "") -> None:
        self._note(code, message, hint, key, Level.ERROR)

    def _note(self, code: str, message: str, hint: str, key: str, level: Level) -> None:
        pointer = f"{self._pointer}/{key}" if key else self._pointer
        self.problems.append(Problem(code=code, message=message, hint=hint, pointer=pointer, level=level))


def default_latent_folder(options: Mapping[str, Any], family: str, dataset_id: str) -> str:
    if options.get("cache_dir_vae"):
        return f"{options['cache_dir_vae']}/{dataset_id}"
    return f"{_cache_base(options)}/cache/vae/{family}/{dataset_id}"


def default_download_folder(options: Mapping[str, Any], dataset_id: str) -> str:
    return f"{_cache_base(options)}/cache/csv/{dataset_id}"


def _cache_base(options: Mapping[str, Any]) -> str:
    return options.get("cache_dir") or options.get("output_dir") or "."


def _check_ids(entries: list[Any]) -> list[Problem]:
    problems: list[Problem] = []
    first: dict[str, int] = {}
    for index, entry in enumerate(cast(list[dict[str, Any]], [e if isinstance(e, dict) else {} for e in entries])):
        name = entry.get("id")
        if not isinstance(name, str):
            continue
        if name in first:
            message = f"Two datasets have the id {name!r} (entries {first[name]} and {index})."
            problems.append(
                Problem(
                    code="duplicate_dataset_id",
                    message=message,
                    hint="Give each its own.",
                    pointer=f"/datasets/{index}/id",
                )
            )
        first.setdefault(name, index)
    return problems


def _settle_text_embeds(found: DatasetEntries, options: Mapping[str, Any], directories: Directories) -> None:
    """See to exactly one default text cache: a lone one is it, none at all makes one."""
    caches = [entry for entry in found.entries if entry["dataset_type"] == "text_embeds" and not entry["disabled"]]
    if not caches:
        made = {
            "id": "text-embeds",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": directories.absolute(str(options.get("cache_dir_text", "cache"))),
            "write_batch_size": options.get("write_batch_size", 128),
            "text_encoder_batch_size": options.get("text_encoder_batch_size", 16),
        }
        found.entries.append(MODELS["text_embeds"].model_validate(made).model_dump(mode="json"))
        found.pointers.append("/--cache_dir_text")
    elif len(caches) == 1:
        caches[0]["default"] = True
    elif (defaults := sum(entry["default"] for entry in caches)) != 1:
        message = f"Of {len(caches)} text_embeds datasets exactly one is the default; here {defaults or 'none'} are."
        found.problems.append(
            Problem(code="text_default", message=message, hint='Set "default": true on one.', pointer="/datasets")
        )
