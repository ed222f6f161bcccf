"""Option resolution: default < flavour < environment < request, with the provenance of every value."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from simpletuner.config.dataset_file import DatasetEntries, read_dataset_file, resolve_datasets
from simpletuner.config.directories import Directories, expand_placeholders
from simpletuner.config.lycoris_source import find_lycoris_config
from simpletuner.config.option import OptionField
from simpletuner.config.prompt import plan_prompts
from simpletuner.config.prompt_library import settle_library
from simpletuner.config.publish_target import read_targets
from simpletuner.config.rules import check
from simpletuner.config.script import SCRIPTS
from simpletuner.config.situation import Situation, error_about
from simpletuner.config.sources import NOT_GIVEN, Layer, parse_value
from simpletuner.config.train_config import TrainConfig, option_fields
from simpletuner.config.webhook import read_webhooks
from simpletuner.errors import Level, Problem, UserError, errors_of, warnings_of
from simpletuner.families.registry import family_names, load_spec
from simpletuner.families.spec import FamilySpec
from simpletuner.job import write_atomic

_OF_ONE_VALUE = ("bad_value", "bad_choice", "bad_boolean", "bad_json", "required", "env_not_set", "unknown_flavour")
_FROM_FAMILY = ("model_family", "model_flavour", "pretrained_model_name_or_path")
"""Without a family there is one complaint, of the family."""
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
    lycoris_file: Path | None = None
    """Where the LyCORIS configuration that follows the options is to be written."""

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
    values = _expand(found)
    _settle_lycoris(found, values, layers, directories)
    _settle_webhooks(found, values, directories)
    _settle_publishing(found, values, directories)
    broken = {problem.option for problem in found.errors if problem.code in _OF_ONE_VALUE and problem.option}
    entries = DatasetEntries()
    if read_datasets:
        entries = _read_datasets(found, values, directories, found.spec)
    found.datasets = entries.entries
    if not read_datasets or errors_of(entries.problems):
        broken.add("datasets")
    layer_names = {name: origin.layer for name, origin in found.origins.items()}
    found.problems += check(
        Situation(
            values,
            layer_names,
            entries.entries,
            entries.pointers,
            frozenset(broken),
            found.spec,
            directories,
            for_start,
        )
    )
    if not found.errors:
        _build(found, values, found.spec, directories)
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
            if option.name not in _FROM_FAMILY:
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
            built = str(option.default).lower() if isinstance(option.default, bool) else option.default
            hint = "Leave it out." if built is None else f"What is built is {built}."
            found.problems.append(error_about("option_not_supported_yet", option.name, message, hint))
    _default_epochs(found)
    _name_warmup(found)


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


def _name_warmup(found: Resolution) -> None:
    """`constant` with a warm-up has a name of its own."""
    if found.values.get("lr_scheduler") != "constant" or not found.values.get("lr_warmup_steps"):
        return
    found.values["lr_scheduler"] = "constant_with_warmup"
    found.problems.append(
        Problem(
            code="legacy_option",
            option="lr_scheduler",
            message="--lr_scheduler constant with a warm-up is constant_with_warmup.",
            hint="Write constant_with_warmup, or set --lr_warmup_steps to 0.",
            pointer="/--lr_scheduler",
            level=Level.WARNING,
        )
    )


def _expand(found: Resolution) -> dict[str, Any]:
    """The values with `{env:NAME}` replaced: what the run itself sees.

    Not in commands: they are filled when they run, after they were split, and no event shows what was put in.
    """
    expanded: dict[str, Any] = {}
    for option, value in found.values.items():
        expanded[option], missing = expand_placeholders(value)
        if option in SCRIPTS:
            expanded[option] = value
        found.problems += [
            Problem(
                code="env_not_set",
                option=option,
                message=f"The variable {name} is not set.",
                hint="Set it before the job is started.",
                pointer=f"/--{option}",
            )
            for name in missing
        ]
    return expanded


def _settle_lycoris(
    found: Resolution, values: dict[str, Any], layers: Sequence[Layer], directories: Directories
) -> None:
    """Put the LyCORIS configuration itself in place of its path."""
    try:
        source = find_lycoris_config(values, [layer.name for layer in layers], directories)
    except UserError as error:
        option = "lycoris_config"
        found.problems.append(
            Problem(code=error.code, option=option, message=error.message, hint=error.hint, pointer=error.pointer)
        )
        return
    if source is not None:
        values["lycoris_config"], found.lycoris_file = source.config, source.file


def _settle_webhooks(found: Resolution, values: dict[str, Any], directories: Directories) -> None:
    """Endpoints are frozen by content. One with a variable that is not set is not judged."""
    value = values.get("webhook_config")
    if value is not None and not any(problem.option == "webhook_config" for problem in found.errors):
        endpoints, problems = read_webhooks(value, directories)
        found.problems += problems
        values["webhook_config"] = [endpoint.model_dump(mode="json") for endpoint in endpoints]


def _settle_publishing(found: Resolution, values: dict[str, Any], directories: Directories) -> None:
    """Places are frozen by content, as webhooks are."""
    value = values.get("publishing_config")
    if value is not None and not any(problem.option == "publishing_config" for problem in found.errors):
        prefix = Path(values.get("output_dir") or "").name
        targets, problems = read_targets(value, directories, prefix=prefix)
        found.problems += problems
        values["publishing_config"] = [target.model_dump(mode="json") for target in targets]


def _read_datasets(
    found: Resolution, values: Mapping[str, Any], directories: Directories, spec: FamilySpec
) -> DatasetEntries:
    name = values.get("data_backend_config")
    entries = DatasetEntries()
    if name is None:
        return entries
    try:
        raw, about_text = read_dataset_file(name, directories)
    except UserError as error:
        pointer = error.pointer or "/--data_backend_config"
        entries.problems.append(Problem(code=error.code, message=error.message, hint=error.hint, pointer=pointer))
    else:
        entries = resolve_datasets(raw, values, directories, spec.name)
        entries.problems = about_text + entries.problems
    found.problems += entries.problems
    return entries


def _build(found: Resolution, values: Mapping[str, Any], spec: FamilySpec, directories: Directories) -> None:
    frozen = dict(values)
    for option in _PATH_OPTIONS:
        if frozen[option] is not None:
            frozen[option] = directories.absolute(frozen[option])
    frozen["data_backend_config"] = str(directories.locate(frozen["data_backend_config"]))
    edits = spec.flavours[frozen["model_flavour"]].edits_references
    library = frozen["user_prompt_library"]
    frozen["user_prompt_library"], problems = settle_library(library, directories, edits_references=edits)
    found.problems += problems
    if frozen["init_lora"] is not None:
        frozen["init_lora"] = str(directories.locate(frozen["init_lora"]))
    local = directories.workspace / frozen["pretrained_model_name_or_path"]
    if local.is_dir():
        frozen["pretrained_model_name_or_path"] = str(local)
    resume = frozen["resume_from_checkpoint"]
    if resume is not None and "/" in resume:
        frozen["resume_from_checkpoint"] = directories.absolute(resume)
    if found.errors:
        return
    config = TrainConfig.from_flat(frozen, found.datasets, spec)
    try:
        plan_prompts(config.validation)
    except UserError as error:
        found.problems.append(error_about(error.code, "user_prompt_library", error.message, error.hint))
    else:
        found.config = config


def freeze(found: Resolution) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """`(config, provenance, datasets)` for a job's directory. Draws the seed where none was given."""
    config = found.require().to_flat()
    if found.lycoris_file is not None:
        _write_lycoris(found.lycoris_file, config["lycoris_config"])
    if config["seed"] in (None, 0, -1):
        config["seed"] = secrets.randbelow(2**31 - 1) + 1
    return config, provenance_of(found), found.datasets


def provenance_of(found: Resolution) -> dict[str, dict[str, Any]]:
    """Where each value comes from, and what it hides."""
    return {
        name: {
            "layer": origin.layer,
            "value": found.values[name],
            "hidden": [{"layer": layer, "value": value} for layer, value in origin.hidden],
        }
        for name, origin in found.origins.items()
    }


def _write_lycoris(file: Path, config: Mapping[str, Any]) -> None:
    content = (json.dumps(config, indent=2) + "\n").encode()
    if not file.exists() or file.read_bytes() != content:
        write_atomic(file, content)
