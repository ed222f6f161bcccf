"""`simpletuner configs validate`: the rules of a start, here or at a server."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from simpletuner.cli.configs import problem_line
from simpletuner.cli.flags import NO_FLAGS, ServerFlags, Switch
from simpletuner.cli.local_config import read_local_config
from simpletuner.cli.refusal import Refusal
from simpletuner.cli.words import LocalName, OptionWord, form
from simpletuner.errors import ExitCode, errors_of, warnings_of
from simpletuner.server.config_view import mask, secret_names
from simpletuner.server.deep import PLANS, DeepFindings, DeepValidation, budget_bytes


def validate(
    name: LocalName,
    *words: OptionWord,
    deep: Switch = False,
    fit_budget_gb: float | None = None,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Say what is wrong with an environment. Asks no server, unless SIMPLETUNER_URL or --url names one.

    Parameters
    ----------
    name
        Environment.
    words
        key=value, to try other options than the environment's.
    deep
        Look at every picture and at the model's configuration, and predict memory and disk.
    fit_budget_gb
        Propose settings that stay inside this much memory, in GB; looks as deep does.
    """
    look = _ask_server if flags.names_server else _look_here
    answer = look(name, words, flags, deep or fit_budget_gb is not None, fit_budget_gb)
    findings = [("error", item) for item in answer["errors"]] + [("warning", item) for item in answer["warnings"]]
    verdict = "is valid" if answer["valid"] else "is not valid"
    plans = [answer[plan]["message"] for plan in PLANS if answer[plan]]
    flags.show(answer, f"{name} {verdict}", *(problem_line(level, item) for level, item in findings), *plans)
    return 0 if answer["valid"] else ExitCode.CONFIG


def _look_here(
    name: str, words: tuple[str, ...], _flags: ServerFlags, deep: bool, budget_gb: float | None
) -> dict[str, Any]:
    """As the server would answer."""
    local = read_local_config(name, words, for_start=False)
    found, deeper = local.resolution, DeepFindings([])
    if deep and not found.errors:
        looking = DeepValidation(local.settings.workspace, os.environ)
        deeper = asyncio.run(looking.look(found, budget_bytes(budget_gb)))
    errors = [*found.errors, *errors_of(deeper.problems)]
    warnings = [*found.warnings, *warnings_of(deeper.problems)]
    return {
        "valid": not errors,
        "errors": [problem.as_dict() for problem in errors],
        "warnings": [problem.as_dict() for problem in warnings],
        "resolved_config": mask(found.dashed_values(), secret_names(found.values.get("model_family"))),
        "provenance": found.provenance(),
        **{plan: getattr(deeper, plan) for plan in PLANS},
    }


def _ask_server(
    name: str, words: tuple[str, ...], flags: ServerFlags, deep: bool, budget_gb: float | None
) -> dict[str, Any]:
    """What it finds wrong is its answer, not a refusal."""
    asked = {"environment": name, "deep": deep or None, "fit_budget_gb": budget_gb}
    query = {key: value for key, value in asked.items() if value is not None}
    accept = {"Accept": "application/json"}
    with flags.client() as client:
        try:
            return client.ask("POST", "/api/training/validate", params=query, data=form(words), headers=accept)
        except Refusal as error:
            if error.body is None or "valid" not in error.body:
                raise
            return dict(error.body)
