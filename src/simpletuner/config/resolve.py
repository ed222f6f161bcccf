"""Option resolution: default < flavour < environment < request, with the provenance of every value."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from simpletuner.config.dataset_file import read_dataset_file, resolve_datasets
from simpletuner.config.directories import Directories, expand_placeholders
from simpletuner.config.option import OptionField
from simpletuner.config.rules import Situation, check
from simpletuner.config.sources import NOT_GIVEN, Layer, parse_value
from simpletuner.config.train_config import TrainConfig, option_fields
from simpletuner.errors import Problem, UserError, errors_of, warnings_of
from simpletuner.families.registry import family_names, load_spec
from simpletuner.families.spec import FamilySpec

_PATH_OPTIONS = ("output_dir", "cache_dir", "cache_dir_text", "cache_dir_vae")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from, and what it hides: `(layer, value)` of the lower layers that had one, high to low."""

    layer: str
    hidden: tuple[tuple[str, Any], ...] = ()


@dataclass(slots=True)
class Resolution:
    """The answer to "what would run?": complete when there is no error, and always all problems at once.

    `values` keep `{env:NAME}` placeholders; `explicit` holds what people wrote, environment and request merged.
    """

    values: dict[str, Any] = field(default_factory=dict[str, Any])
    origins: dict[str, Origin] = field(default_factory=dict[str, Origin])
    explicit: dict[str, Any] = field(default_factory=dict[str, Any])
    problems: list[Problem] = field(default_factory=list[Problem])
    datasets: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    spec: FamilySpec | None = None
    config: TrainConfig | None = None

    @property
    def errors(self) -> list[Problem]:
        return errors_of(self.problems)

    @property
    def warnings(self) -> list[Problem]:
        return warnings_of(self.problems)

    @property
    def ok(self) -> bool:
        return self.config is not None and not self.errors

    def require(self) -> TrainConfig:
        """The configuration, or a UserError `invalid_config` that carries every error."""
        if self.config is None or self.errors:
            raise UserError.from_problems(self.errors)
        return self.config

    def provenance(self) -> dict[str, str]:
        """`{"--name": layer}` for answers."""
        return {f"--{name}": origin.layer for name, origin in self.origins.items()}

    def dashed_values(self) -> dict[str, Any]:
        return {f"--{name}": value for name, value in self.values.items()}


def resolve(
    layers: Sequence[Layer],
    directories: Directories,
    *,
    for_start: bool = False,
    read_datasets: bool = True,
) -> Resolution:
    """Merge `layers` (low → high) over the defaults and the flavour's values, check everything, answer all problems.

    `for_start`: the run is to happen on this machine now, so missing folders are errors rather than warnings.
    """
    found = Resolution(problems=[problem for layer in layers for problem in layer.problems])
    found.explicit = _explicit(layers)
    found.spec = _find_spec(layers, found)
    if found.spec is None:
        _parse_all(found, layers, {})
        return found
    flavour = _find_flavour(layers, found.spec, found)
    _parse_all(found, layers, found.spec.layer_values(flavour))
    if read_datasets:
        _read_datasets(found, directories, found.spec)
    if any(problem.code in ("bad_value", "bad_choice", "bad_boolean", "required") for problem in found.errors):
        return found
    layer_names = {name: origin.layer for name, origin in found.origins.items()}
    found.problems += check(Situation(found.values, layer_names, found.datasets, found.spec, directories, for_start))
    if not found.errors:
        _build(found, found.spec, directories)
    return found


def _explicit(layers: Sequence[Layer]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer.values
    return {name: value for name, value in merged.items() if value is not None}


def _highest(layers: Sequence[Layer], name: str) -> Any:
    return next((layer.values[name] for layer in reversed(layers) if layer.values.get(name)), None)


def _find_spec(layers: Sequence[Layer], found: Resolution) -> FamilySpec | None:
    family = _highest(layers, "model_family")
    if family is None:
        found.problems.append(
            Problem(
                code="required",
                option="model_family",
                message="--model_family is required.",
                hint=f"One of: {', '.join(family_names())}.",
                pointer="/--model_family",
            )
        )
        return None
    try:
        return load_spec(str(family))
    except UserError as error:
        found.problems.append(
            Problem(
                code=error.code, option="model_family", message=error.message, hint=error.hint, pointer=error.pointer
            )
        )
        return None


def _find_flavour(layers: Sequence[Layer], spec: FamilySpec, found: Resolution) -> str:
    flavour = str(_highest(layers, "model_flavour") or spec.default_flavour)
    if flavour in spec.flavours:
        return flavour
    near = get_close_matches(flavour, list(spec.flavours), n=1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    found.problems.append(
        Problem(
            code="unknown_flavour",
            option="model_flavour",
            message=f"{spec.title} has no flavour {flavour!r}.",
            hint=f"{guess}Known: {', '.join(spec.flavours)}.",
            pointer="/--model_flavour",
        )
    )
    return spec.default_flavour


def _parse_all(found: Resolution, layers: Sequence[Layer], flavour_values: Mapping[str, Any]) -> None:
    """Type every option from its highest layer that gives it a value."""
    options = option_fields(found.spec.options) if found.spec else option_fields()
    for option in options.values():
        candidates = _candidates(option, layers, flavour_values, found)
        if not candidates:
            if option.name != "model_family":
                message = f"--{option.name} is required."
                found.problems.append(
                    Problem(
                        code="required",
                        option=option.name,
                        message=message,
                        hint=option.help,
                        pointer=f"/--{option.name}",
                    )
                )
            continue
        found.values[option.name] = candidates[0][1]
        found.origins[option.name] = Origin(candidates[0][0], tuple(candidates[1:]))
        if option.ui.later and candidates[0][1] != option.default:
            message = f"The option --{option.name} is not supported yet."
            found.problems.append(
                Problem(
                    code="option_not_supported_yet", option=option.name, message=message, pointer=f"/--{option.name}"
                )
            )
    _default_epochs(found)


def _candidates(
    option: OptionField, layers: Sequence[Layer], flavour_values: Mapping[str, Any], found: Resolution
) -> list[tuple[str, Any]]:
    """`(layer, value)` from the highest layer down; a `null` uncovers what is below it."""
    candidates: list[tuple[str, Any]] = []
    for layer in reversed(layers):
        raw = layer.values.get(option.name)
        if raw is None:
            continue
        value, problem = parse_value(option, raw, is_text=layer.is_text)
        if problem is not None:
            found.problems.append(problem)
        elif value is not NOT_GIVEN:
            candidates.append((layer.name, value))
    if flavour_values.get(option.name) is not None:
        candidates.append(("flavour", flavour_values[option.name]))
    if not option.required:
        candidates.append(("default", option.default))
    return candidates


def _default_epochs(found: Resolution) -> None:
    """A merely defaulted number of epochs counts as 0 when steps were given."""
    if found.values.get("max_train_steps") and found.origins["num_train_epochs"].layer in ("default", "flavour"):
        found.values["num_train_epochs"] = 0


def _read_datasets(found: Resolution, directories: Directories, spec: FamilySpec) -> None:
    name = found.values.get("data_backend_config")
    if name is None:
        return
    try:
        entries, problems = read_dataset_file(directories.locate(name), shown=name)
    except UserError as error:
        found.problems.append(
            Problem(
                code=error.code,
                message=error.message,
                hint=error.hint,
                pointer=error.pointer or "/--data_backend_config",
            )
        )
        return
    found.problems += problems
    found.datasets, problems = resolve_datasets(entries, found.values, directories, spec.name)
    found.problems += problems


def _build(found: Resolution, spec: FamilySpec, directories: Directories) -> None:
    frozen, missing = expand_placeholders(found.values)
    for name in missing:
        message = f"The variable {name} is not set."
        found.problems.append(Problem(code="env_not_set", message=message, hint="Set it before the job is started."))
    for option in _PATH_OPTIONS:
        if frozen[option] is not None:
            frozen[option] = directories.absolute(frozen[option])
    frozen["data_backend_config"] = str(directories.locate(frozen["data_backend_config"]))
    if isinstance(library := frozen["user_prompt_library"], str):
        frozen["user_prompt_library"] = _read_library(library, directories, found)
    local = directories.workspace / frozen["pretrained_model_name_or_path"]
    if local.is_dir():
        frozen["pretrained_model_name_or_path"] = str(local)
    if not found.errors:
        found.config = TrainConfig.from_flat(frozen, found.datasets, spec)


def _read_library(path: str, directories: Directories, found: Resolution) -> dict[str, Any] | None:
    """A prompt library given as a file is frozen by content."""
    file = directories.locate(path)
    try:
        library = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"The prompt library {path!r} cannot be read: {error}."
        found.problems.append(
            Problem(
                code="bad_prompt_library",
                option="user_prompt_library",
                message=message,
                pointer="/--user_prompt_library",
            )
        )
        return None
    return library


def freeze(found: Resolution) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """`(config, provenance, datasets)` for a job's directory. Draws the seed where none was given."""
    config = found.require().to_flat()
    if config["seed"] in (None, 0, -1):
        config["seed"] = secrets.randbelow(2**31 - 1) + 1
    provenance = {
        name: {
            "layer": origin.layer,
            "value": found.values[name],
            "hidden": [{"layer": layer, "value": value} for layer, value in origin.hidden],
        }
        for name, origin in found.origins.items()
    }
    return config, provenance, found.datasets
