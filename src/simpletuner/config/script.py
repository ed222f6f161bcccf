"""Programs of the user's that a run starts: how a template becomes a list of arguments. training.md §7.3.

The template is split first and filled afterwards, each word by itself: whatever a value holds, it stays one argument.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from simpletuner.config.situation import Situation, error_about, warning_about
from simpletuner.config.train_config import TrainConfig, option_fields
from simpletuner.errors import Problem, UserError

LOCAL_CHECKPOINT = "local_checkpoint_path"
_DRAWN_HERE = ("disable_benchmark", "validation_preview")
_VALIDATED_ELSEWHERE = ("validation_external_script", "validation_external_background")
SCRIPTS = ("validation_external_script", "post_checkpoint_script", "post_upload_script", "disk_low_script")
_PLACEHOLDER = re.compile(r"\{((?:env:)?[A-Za-z_][A-Za-z0-9_]*)\}")
_OF_THE_MOMENT = (LOCAL_CHECKPOINT, "remote_checkpoint_path", "global_step")
_OPTIONS = ("tracker_run_name", "tracker_project_name", "model_family", "model_type", "lora_type")


def placeholder_names() -> list[str]:
    validation = [option.name for option in option_fields().values() if option.name.startswith("validation_")]
    return [*_OF_THE_MOMENT, *_OPTIONS, "huggingface_path", *validation]


def split_template(template: str) -> list[str]:
    """The words of a command, still to be filled. Raises UserError `bad_script` or `unknown_placeholder`."""
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise UserError("bad_script", f"The command cannot be split into words: {error}.") from error
    if not words:
        raise UserError("bad_script", "The command is empty.", hint="Name a program and its arguments.")
    known = placeholder_names()
    for name in (name for word in words for name in _PLACEHOLDER.findall(word)):
        if name not in known and not name.startswith("env:"):
            near = get_close_matches(name, known, n=1)
            guess = f"Did you mean {{{near[0]}}}? " if near else ""
            hint = f"{guess}There is no shell: known are {', '.join(known)}, and env:NAME for a variable."
            raise UserError("unknown_placeholder", f"There is no placeholder {{{name}}}.", hint=hint)
    return words


def fill_words(words: list[str], values: Mapping[str, str]) -> list[str]:
    """Each placeholder once, literally; those without a value stay as they are."""
    return [_PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), word) for word in words]


def find_placeholders(words: list[str]) -> set[str]:
    return {name for word in words for name in _PLACEHOLDER.findall(word)}


def fixed_values(config: TrainConfig) -> dict[str, str]:
    """The placeholders that are the same all through a run; those of the moment are empty."""
    flat = config.to_flat()
    flat["huggingface_path"] = config.publishing.hub_model_id
    return {name: as_text(flat.get(name)) for name in placeholder_names()}


def as_text(value: Any) -> str:
    """0 → `0`, false → `false`, nothing → empty, a list as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)


def script_rule(at: Situation) -> Iterator[Problem]:
    """Scripts can be split and filled; an external validation needs one, and one needs an external validation."""
    for option in SCRIPTS:
        if at.values[option] is None:
            continue
        try:
            split_template(at.values[option])
        except UserError as error:
            yield error_about(error.code, option, error.message, error.hint)
    external = at.values["validation_method"] == "external-script"
    if external and at.values["validation_external_script"] is None:
        message = "--validation_method external-script needs --validation_external_script."
        yield error_about("incompatible_options", "validation_external_script", message, "Name the program to run.")
    idle = (
        ("disable_benchmark", "validation_preview")
        if external
        else ("validation_external_script", "validation_external_background")
    )
    for option in idle:
        if at.given(option):
            method = at.values["validation_method"]
            message = f"--{option} has no effect: --validation_method is {method}."
            yield warning_about("option_no_effect", option, message)
