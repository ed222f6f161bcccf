"""`simpletuner configs validate`: the rules of a start, here or at a server."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from simpletuner.cli.configs import problem_line
from simpletuner.cli.flags import NO_FLAGS, ServerFlags
from simpletuner.cli.local_config import read_local_config
from simpletuner.cli.refusal import Refusal
from simpletuner.cli.words import OptionWord, complete_environments, form
from simpletuner.errors import ExitCode
from simpletuner.server.config_view import mask, secret_names

LocalName = Annotated[str, Parameter(completer=complete_environments)]


def validate(name: LocalName, *words: OptionWord, flags: ServerFlags = NO_FLAGS) -> int:
    """Say what is wrong with an environment. Asks no server, unless SIMPLETUNER_URL or --url names one.

    Parameters
    ----------
    name
        Environment.
    words
        key=value, to try other options than the environment's.
    """
    answer = _ask_server(name, words, flags) if flags.names_server else _look_here(name, words)
    findings = [("error", item) for item in answer["errors"]] + [("warning", item) for item in answer["warnings"]]
    verdict = "is valid" if answer["valid"] else "is not valid"
    flags.show(answer, f"{name} {verdict}", *(problem_line(level, item) for level, item in findings))
    return 0 if answer["valid"] else ExitCode.CONFIG


def _look_here(name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """As the server would answer."""
    found = read_local_config(name, words, for_start=False).resolution
    return {
        "valid": not found.errors,
        "errors": [problem.as_dict() for problem in found.errors],
        "warnings": [problem.as_dict() for problem in found.warnings],
        "resolved_config": mask(found.dashed_values(), secret_names(found.values.get("model_family"))),
        "provenance": found.provenance(),
        "memory_plan": None,
    }


def _ask_server(name: str, words: tuple[str, ...], flags: ServerFlags) -> dict[str, Any]:
    """What it finds wrong is its answer, not a refusal."""
    query, accept = {"environment": name}, {"Accept": "application/json"}
    with flags.client() as client:
        try:
            return client.ask("POST", "/api/training/validate", params=query, data=form(words), headers=accept)
        except Refusal as error:
            if error.body is None or "valid" not in error.body:
                raise
            return dict(error.body)
