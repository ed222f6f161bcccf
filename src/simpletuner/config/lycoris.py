"""The LyCORIS configuration: read, checked, or made from rank, alpha and dropout. training.md §4.6. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from simpletuner.config.model_options import AdapterOptions
from simpletuner.errors import Problem, UserError

_PLAIN = "Use --base_model_precision bf16, or another algorithm."
POINTER = "/--lycoris_config"
FILE = "lycoris_config.json"
ATTENTION = "Attention"
"""In a preset: every attention class of the family."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"linear_dim": 64, "linear_alpha": 32},
    "locon": {"linear_dim": 64, "linear_alpha": 32},
    "loha": {"linear_dim": 32, "linear_alpha": 16},
    "lokr": {"linear_dim": 10000, "linear_alpha": 1, "factor": 16},
    "full": {"linear_dim": 1024, "linear_alpha": 512},
    "ia3": {"linear_dim": 4, "linear_alpha": 1},
    "dylora": {"linear_dim": 128, "linear_alpha": 64, "block_size": 1},
    "glora": {"linear_dim": 64, "linear_alpha": 32},
    "diag-oft": {"linear_dim": 64, "linear_alpha": 64},
    "boft": {"linear_dim": 64, "linear_alpha": 64},
    "tlora": {"linear_dim": 64, "linear_alpha": 32},
}
"""Algorithm → what a given configuration that lacks them gets."""

LATER = {
    "dylora": "its random rank differs between a forward pass and its recomputation",
    "ia3": "the library cannot read its own files of it",
    "tlora": "no other program has a place for its keys",
}
"""Algorithms of the library that are not supported yet, and why."""

_NEEDS_WEIGHTS = ("full", "diag-oft", "boft")
"""They change the base's weights themselves, or read them as a matrix."""

_OWN_KEYS = frozenset({"algo", "multiplier", "linear_dim", "linear_alpha", "apply_preset"})
_PASSED_ON = frozenset(
    {
        "conv_dim", "conv_alpha", "dropout", "rank_dropout", "module_dropout", "use_tucker", "use_scalar", "block_size",
        "train_norm", "constraint", "rescaled", "dora_wd", "wd_on_output", "full_matrix", "bypass_mode",
        "unbalanced_factorization", "factor", "decompose_both", "rs_lora", "rank_dropout_scale",
    }
)  # fmt: skip
_PRESET_KEYS = frozenset(
    {"target_module", "target_name", "module_algo_map", "name_algo_map", "exclude_name", "enable_conv", "use_fnmatch"}
)
_GENERATED = "_generated_from"
"""In a file that we wrote: the options it was made of. Nobody edited it as long as it follows from them."""


def make_lycoris_config(adapter: AdapterOptions) -> dict[str, Any]:
    """What `lora_rank`, `lora_alpha` and `lora_dropout` say. `lora` alone honours all three."""
    return {
        "algo": "lora",
        "multiplier": 1.0,
        "linear_dim": adapter.lora_rank,
        "linear_alpha": adapter.lora_alpha or adapter.lora_rank,
        "dropout": adapter.lora_dropout,
        "apply_preset": {"target_module": [ATTENTION]},
    }


def generated_text(adapter: AdapterOptions) -> bytes:
    """The file of `make_lycoris_config`, with the options it came from."""
    origin = {"lora_rank": adapter.lora_rank, "lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout}
    return json.dumps(make_lycoris_config(adapter) | {_GENERATED: origin}, indent=2).encode() + b"\n"


def is_unedited(config: Mapping[str, Any]) -> bool:
    """Whether it says no more than the options that it was made of."""
    origin = config.get(_GENERATED)
    if not isinstance(origin, dict):
        return False
    known = {name: value for name, value in cast(dict[str, Any], origin).items() if name in AdapterOptions.model_fields}
    return dict(config) == make_lycoris_config(AdapterOptions(**known)) | {_GENERATED: origin}


def read_lycoris_config(path: Path, shown: str) -> dict[str, Any]:
    """Raises UserError `lycoris_config_missing` or `bad_lycoris_config`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = f"It is looked for as {path}. Leave the option empty to have one written."
        raise UserError(
            "lycoris_config_missing", f"The file {shown!r} does not exist.", hint=hint, pointer=POINTER
        ) from error
    except (OSError, ValueError) as error:
        raise UserError("bad_lycoris_config", f"{shown!r} cannot be read: {error}.", pointer=POINTER) from error
    if not isinstance(value, dict):
        raise UserError("bad_lycoris_config", f"{shown!r} holds no object.", pointer=POINTER)
    return cast(dict[str, Any], value)


def check_lycoris_config(config: Mapping[str, Any]) -> list[Problem]:
    """Unknown algorithms, keys and preset keys, and numbers that are none."""
    algo = str(config.get("algo", "lora"))
    problems = [*_check_algo("algo", algo)]
    known = {*_OWN_KEYS, *_PASSED_ON}
    for key in config.keys() - {_GENERATED}:
        problems += _check_choice("unknown_lycoris_key", key, key, known, "key")
    for key in ("linear_dim", "linear_alpha", "multiplier"):
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            problems.append(_problem("bad_value", key, f"{key} is a number above 0, not {value!r}."))
    if config.get("linear_dim", 1) != int(config.get("linear_dim", 1) if not problems else 1):
        problems.append(_problem("bad_value", "linear_dim", "linear_dim is a whole number."))
    return problems + _check_preset(config.get("apply_preset", {}))


def _check_preset(preset: Any) -> list[Problem]:
    if not isinstance(preset, dict):
        hint = f"Write an object with some of: {', '.join(sorted(_PRESET_KEYS))}."
        return [_problem("unknown_preset", "apply_preset", f"There is no preset {preset!r}.", hint)]
    found = cast(dict[str, Any], preset)
    problems: list[Problem] = []
    for key in found:
        problems += _check_choice("unknown_preset", f"apply_preset/{key}", key, _PRESET_KEYS, "preset key")
    for table in ("module_algo_map", "name_algo_map"):
        for target, row in cast(dict[str, dict[str, Any]], found.get(table, {})).items():
            name = str(row.get("algo", "lora"))
            problems += _check_algo(f"apply_preset/{table}/{target}", name)
    return problems


def check_base(config: Mapping[str, Any], precision: str) -> list[Problem]:
    """Whether the algorithm works over a quantised base; `precision` is one."""
    algo = str(config.get("algo", "lora"))
    if algo in _NEEDS_WEIGHTS or config.get("dora_wd"):
        what = "dora_wd" if config.get("dora_wd") else algo
        return [_problem("incompatible_options", "algo", f"{what} cannot be trained over a {precision} base.", _PLAIN)]
    return []


def _check_algo(key: str, algo: str) -> list[Problem]:
    if algo in LATER:
        message = f"The LyCORIS algorithm {algo!r} is not supported yet: {LATER[algo]}."
        return [_problem("option_not_supported_yet", key, message)]
    return _check_choice("unknown_algo", key, algo, DEFAULTS.keys() - LATER, "algorithm")


def _check_choice(code: str, key: str, value: str, known: Any, what: str) -> list[Problem]:
    if value in known:
        return []
    near = get_close_matches(value, list(known), n=1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    hint = f"{guess}Known: {', '.join(sorted(known))}."
    return [_problem(code, key, f"LyCORIS has no {what} {value!r}.", hint)]


def _problem(code: str, key: str, message: str, hint: str = "") -> Problem:
    return Problem(code=code, option="lycoris_config", message=message, hint=hint, pointer=f"{POINTER}/{key}")


def complete_lycoris_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the algorithm's defaults and the family's preset where they are missing."""
    algo = str(config.get("algo", "lora"))
    given = {key: value for key, value in config.items() if key != _GENERATED}
    preset = {"apply_preset": {"target_module": [ATTENTION]}}
    return {"multiplier": 1.0} | preset | DEFAULTS[algo] | given | {"algo": algo}
