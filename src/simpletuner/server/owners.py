"""Whose an environment is: its maker's; one that was made by hand is everybody's (api.md §2.2)."""

from __future__ import annotations

from typing import Literal

from simpletuner.server.core import Core
from simpletuner.server.identity import Identity
from simpletuner.server.rights import denied

ConfigVerb = Literal["config.edit", "config.delete"]
EDIT: ConfigVerb = "config.edit"
DELETE: ConfigVerb = "config.delete"


def may_change(core: Core, identity: Identity, name: str, verb: ConfigVerb = EDIT) -> bool:
    """Raises UserError `unknown_config`."""
    owner: object = core.environments.read_metadata(name).get("owner")
    return identity.may_to(verb, identity.user_id if owner is None else str(owner))


def find_changeable(core: Core, identity: Identity, name: str, verb: ConfigVerb = EDIT) -> str:
    """The environment's name without `.json`. Raises UserError `unknown_config`; `permission_denied` of another's."""
    name = core.environments.folder(name).name
    if not may_change(core, identity, name, verb):
        raise denied(f"{verb}.all")
    return name
