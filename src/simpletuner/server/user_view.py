"""Users as clients see them (api.md §2.2)."""

from __future__ import annotations

from pydantic import BaseModel

from simpletuner.server.accounts import rights_of_user
from simpletuner.server.core import Core
from simpletuner.server.identity import Identity
from simpletuner.server.permission import LEVELS
from simpletuner.store.users import UserRow


class LevelView(BaseModel):
    id: int
    name: str
    priority: int


class UserView(BaseModel):
    """`id` is what `user_id` of jobs and `owner` of environments say. `created_at` is null for the open identity."""

    id: str
    email: str | None
    username: str
    display_name: str | None
    avatar_url: str | None = None
    auth_provider: str = "local"
    is_active: bool
    is_admin: bool
    email_verified: bool = False
    created_at: str | None
    last_login_at: str | None
    levels: list[LevelView]
    permissions: list[str]


def show_user(user: UserRow) -> UserView:
    return UserView(
        id=str(user.id),
        email=user.email,
        username=user.username,
        display_name=user.display_name,
        is_active=user.is_active,
        is_admin=user.is_admin,
        created_at=user.created_at,
        last_login_at=user.last_login_at,
        levels=show_levels(user.levels),
        permissions=sorted(rights_of_user(user)),
    )


def show_levels(names: tuple[str, ...]) -> list[LevelView]:
    held = [level for level in LEVELS.values() if level.name in names]
    return [LevelView(id=level.id, name=level.name, priority=level.priority) for level in held]


def show_identity(core: Core, identity: Identity) -> UserView:
    """Its user, with what the credential leaves of the user's rights."""
    if identity.by == "loopback":
        return UserView(
            id=identity.user_id,
            email=None,
            username=identity.name,
            display_name=None,
            is_active=True,
            is_admin=True,
            created_at=None,
            last_login_at=None,
            levels=show_levels(("admin",)),
            permissions=sorted(identity.permissions),
        )
    shown = show_user(core.accounts.user(identity))
    return shown.model_copy(update={"permissions": sorted(identity.permissions), "is_admin": identity.is_admin})
