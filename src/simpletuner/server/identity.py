"""Who asks, as every route sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from simpletuner.server.permission import ADMIN, PERMISSIONS, base_priority_of, holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """`permissions` are what is left of the user's rights within the scope of the credential.

    `scope` holds the globs of a scoped key, None without. `credential_id` is the row of the session or key.
    `base_priority` is what the user's jobs have unless they are given another.
    """

    user_id: str
    name: str
    by: Literal["loopback", "session", "key"]
    permissions: frozenset[str]
    has_access: bool = True
    is_admin: bool = False
    scope: tuple[str, ...] | None = None
    credential_id: int = field(default=0)
    base_priority: int = 0

    @property
    def quota(self) -> str:
        """What limits are counted under: the key, else the user."""
        return f"key:{self.credential_id}" if self.by == "key" else f"user:{self.user_id}"

    def may(self, permission: str) -> bool:
        return holds(self.permissions, permission)

    def may_to(self, verb: str, owner: str | None) -> bool:
        """Of something that `owner` has: `verb` is `job.view` of `job.view.own` and `job.view.all`."""
        if f"{verb}.all" in self.permissions:
            return True
        return f"{verb}.own" in self.permissions and owner == self.user_id


LOCAL = Identity(
    user_id="local",
    name="local",
    by="loopback",
    permissions=PERMISSIONS,
    is_admin=True,
    base_priority=base_priority_of([ADMIN]),
)
