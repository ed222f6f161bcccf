"""From a request and an environment to a checked configuration: validate, start and config ask the same question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.config.option import OptionField
from simpletuner.config.resolve import Resolution, resolve
from simpletuner.config.sources import NOT_GIVEN, Layer, parse_value
from simpletuner.config.train_config import option_fields
from simpletuner.errors import Problem, UserError, errors_of
from simpletuner.families.registry import load_spec
from simpletuner.server.core import Core
from simpletuner.server.option_body import OptionBody

ADHOC = "adhoc-"
NO_ENVIRONMENT = "-"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """`environment` is the base that was merged under the request, None without one."""

    environment: str | None
    request: Layer
    resolution: Resolution

    def merged(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """`stored`, dashed, with what the request gives in its typed form."""
        given = {
            f"--{name}": self.resolution.values[name]
            for name in self.request.values
            if name in self.resolution.origins and self.resolution.origins[name].layer == self.request.name
        }
        return {**stored, **given}


def ask(core: Core, body: OptionBody, environment: str | None, *, for_start: bool) -> Asked:
    """`environment` is the query's. Raises UserError `unknown_config`; everything else is in the problems."""
    base = base_environment(core, environment, names_family=body.value("model_family") is not None)
    stored: Mapping[str, Any] = {}
    broken: list[Problem] = []
    if base is not None:
        try:
            stored = core.environments.read(base).config
        except UserError as error:
            broken.append(Problem(code=error.code, message=error.message, hint=error.hint, pointer=error.pointer))
    known = known_options(body.value("model_family") or stored.get("--model_family"))
    request = body.layer(known)
    layers = [request]
    if base is not None and not broken:
        layers.insert(0, core.environments.layer(base, known))
    if broken:
        return Asked(environment=base, request=request, resolution=Resolution(problems=broken))
    resolution = resolve(layers, core.directories, for_start=for_start)
    return Asked(environment=base, request=request, resolution=resolution)


def base_environment(core: Core, wanted: str | None, *, names_family: bool) -> str | None:
    """A one-off run does not inherit from the one-off run before it."""
    if wanted == NO_ENVIRONMENT:
        return None
    if wanted:
        return core.environments.folder(wanted).name
    active = core.active_environment()
    return None if active and active.startswith(ADHOC) and names_family else active


def known_options(family: object) -> Mapping[str, OptionField]:
    """With the family's own options, where the family is known."""
    if not isinstance(family, str):
        return option_fields()
    try:
        return option_fields(load_spec(family).options)
    except UserError:
        return option_fields()


def typed_values(layer: Layer, known: Mapping[str, OptionField]) -> dict[str, Any]:
    """The layer's values by bare name, typed. Raises UserError `invalid_config` with every wrong name or value."""
    typed: dict[str, Any] = {}
    problems = errors_of(layer.problems)
    for name, raw in layer.values.items():
        if raw is None:
            typed[name] = None
            continue
        value, problem = parse_value(known[name], raw, is_text=layer.is_text)
        if problem is not None:
            problems.append(problem)
        elif value is not NOT_GIVEN:
            typed[name] = value
    if problems:
        raise UserError.from_problems(problems)
    return typed
