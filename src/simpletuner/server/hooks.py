"""Options that run a command on this machine need a right of their own (api.md §2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.errors import Level, Problem, UserError
from simpletuner.server.asking import known_options
from simpletuner.server.identity import Identity

HOOKS = "job.hooks"
CODE = "hook_permission_required"


def require_hooks(identity: Identity, config: Mapping[str, Any]) -> None:
    """`config` by dashed or bare name. Raises UserError `hook_permission_required` where it sets such an option."""
    for warning in hook_warnings(identity, config):
        raise UserError(CODE, warning.message, hint=warning.hint, pointer=warning.pointer)


def hook_warnings(identity: Identity, config: Mapping[str, Any]) -> list[Problem]:
    """What a start by `identity` would be refused for."""
    if identity.may(HOOKS):
        return []
    values = {name.removeprefix("--"): value for name, value in config.items()}
    return [
        Problem(
            code=CODE,
            option=option.name,
            message=f"--{option.name} runs a command on the server; that needs the permission {HOOKS}.",
            hint="Ask an admin.",
            pointer=f"/--{option.name}",
            level=Level.WARNING,
        )
        for option in known_options(values.get("model_family")).values()
        if option.ui.runs_command and values.get(option.name)
    ]
