"""One dependency decides each route's right (api.md §2, column P)."""

from __future__ import annotations

from typing import Any

from fastapi import Depends

from simpletuner.errors import UserError
from simpletuner.server.core import IdentityDep


class Needs:
    """Lets an identity pass that holds `permission`; a test reads it off each route."""

    def __init__(self, permission: str) -> None:
        self.permission = permission

    def __call__(self, identity: IdentityDep) -> None:
        if not identity.may(self.permission):
            raise UserError("permission_denied", f"This needs the permission {self.permission}.")


def needs(permission: str) -> Any:
    """For a route's `dependencies`."""
    return Depends(Needs(permission))
