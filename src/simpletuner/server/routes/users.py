"""Users and what they may do: /api/users (api.md §2.2)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from simpletuner.errors import UserError
from simpletuner.server.accounts import rights_of_user
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.errors import did_you_mean, error_responses
from simpletuner.server.identity import Identity
from simpletuner.server.permission import ADMIN, LEVELS, PERMISSIONS
from simpletuner.server.rights import AUTH, denied, needs
from simpletuner.server.routes.auth import Email, NewAccount, Password, Success, Username
from simpletuner.server.user_view import LevelView, UserView, show_identity, show_levels, show_user
from simpletuner.store.users import UserRow

router = APIRouter(prefix="/api/users", tags=["users", "configurations"])

UserId = Annotated[int, Path(ge=1, le=2**31)]
UNKNOWN = error_responses("not_found")
CHANGE_ERRORS = error_responses("not_found", "already_exists", "last_admin")
LEVEL_ERRORS = error_responses("not_found", "last_admin", "unknown_level")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewUserBody(NewAccount):
    is_admin: bool = False
    level_names: list[str] = Field(default=["researcher"], max_length=10, examples=[["researcher"]])


class ProfileChange(_Body):
    email: Email | None = None
    display_name: str | None = Field(default=None, max_length=100)


class UserChange(ProfileChange):
    username: Username | None = None
    is_active: bool | None = None
    is_admin: bool | None = None
    password: Password | None = None


class LevelName(_Body):
    level_name: str


class PermissionChange(_Body):
    permission_name: str
    granted: bool


@router.get("", operation_id="list_users", dependencies=[needs("admin.users")])
def list_users(
    core: CoreDep,
    response: Response,
    include_inactive: bool = False,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> list[UserView]:
    page = core.store.users.find(include_inactive=include_inactive, limit=limit, offset=offset)
    response.headers["X-Total-Count"] = str(page.total)
    return [show_user(user) for user in page.users]


@router.post(
    "",
    operation_id="create_user",
    status_code=201,
    dependencies=[needs("admin.users"), audits("user.create")],
    responses=error_responses("already_exists", "unknown_level"),
)
def create_user(core: CoreDep, identity: IdentityDep, body: NewUserBody, note: AuditDep) -> UserView:
    """With levels that reach no further than the asker."""
    levels = [*body.level_names, *([ADMIN] if body.is_admin else [])]
    for name in levels:
        check_reach(identity, level_permissions(name))
    user = core.accounts.create_user(**body.model_dump(exclude={"is_admin", "level_names"}), levels=levels)
    note.target, note.detail = user.username, {"levels": levels}
    return show_user(user)


@router.get("/meta/levels", operation_id="list_levels", dependencies=[needs(AUTH)])
def list_levels() -> list[LevelView]:
    return show_levels(tuple(LEVELS))


@router.get("/meta/permissions", operation_id="list_permissions", dependencies=[needs(AUTH)])
def list_permissions() -> list[str]:
    return sorted(PERMISSIONS)


@router.get("/me/profile", operation_id="get_profile", dependencies=[needs(AUTH)])
def get_profile(core: CoreDep, identity: IdentityDep) -> UserView:
    return show_identity(core, identity)


@router.patch(
    "/me/profile",
    operation_id="patch_profile",
    dependencies=[needs(AUTH), audits("user.profile")],
    responses=error_responses("already_exists"),
)
def patch_profile(core: CoreDep, identity: IdentityDep, body: ProfileChange) -> UserView:
    user = core.accounts.user(identity)
    return show_user(core.accounts.change_user(user.id, given(body)))


@router.get("/{user_id}", operation_id="get_user", dependencies=[needs("admin.users")], responses=UNKNOWN)
def get_user(core: CoreDep, user_id: UserId) -> UserView:
    return show_user(find_user(core, user_id))


@router.patch(
    "/{user_id}",
    operation_id="patch_user",
    dependencies=[needs("admin.users"), audits("user.edit")],
    responses=CHANGE_ERRORS,
)
def patch_user(core: CoreDep, identity: IdentityDep, user_id: UserId, body: UserChange, note: AuditDep) -> UserView:
    """Deactivation ends the user's sessions and keys at once."""
    user = reachable_user(core, identity, user_id)
    if body.is_admin:
        check_reach(identity, LEVELS[ADMIN].permissions)
    if body.is_active is False:
        _refuse_oneself(identity, user)
    changes = given(body)
    note.target, note.detail = user.username, {"changed": sorted(changes)}
    return show_user(core.accounts.change_user(user_id, changes))


@router.delete(
    "/{user_id}",
    operation_id="delete_user",
    dependencies=[needs("admin.users"), audits("user.delete")],
    responses=error_responses("not_found", "last_admin"),
)
def delete_user(core: CoreDep, identity: IdentityDep, user_id: UserId, note: AuditDep) -> Success:
    """The user's jobs and environments stay."""
    user = reachable_user(core, identity, user_id)
    _refuse_oneself(identity, user)
    core.store.users.delete(user_id)
    core.accounts.end_streams_of(user)
    note.target = user.username
    return Success()


@router.post(
    "/{user_id}/levels",
    operation_id="add_level",
    dependencies=[needs("admin.levels"), audits("user.level.add")],
    responses=LEVEL_ERRORS,
)
def add_level(core: CoreDep, identity: IdentityDep, user_id: UserId, body: LevelName, note: AuditDep) -> UserView:
    check_reach(identity, level_permissions(body.level_name))
    note.detail = {"level": body.level_name}
    return _changed(core, core.store.users.set_level(user_id, body.level_name, True))


@router.delete(
    "/{user_id}/levels/{name}",
    operation_id="remove_level",
    dependencies=[needs("admin.levels"), audits("user.level.remove")],
    responses=LEVEL_ERRORS,
)
def remove_level(core: CoreDep, identity: IdentityDep, user_id: UserId, name: str) -> UserView:
    check_reach(identity, level_permissions(name))
    return _changed(core, core.store.users.set_level(user_id, name, False))


@router.post(
    "/{user_id}/permissions",
    operation_id="set_permission",
    dependencies=[needs("admin.levels"), audits("user.permission.set")],
    responses=error_responses("not_found", "last_admin"),
)
def set_permission(
    core: CoreDep, identity: IdentityDep, user_id: UserId, body: PermissionChange, note: AuditDep
) -> UserView:
    """Grant it beside the levels, or deny it whatever they say."""
    check_reach(identity, known_permission(body.permission_name))
    note.detail = body.model_dump()
    return _changed(core, core.store.users.set_permission(user_id, body.permission_name, body.granted))


@router.delete(
    "/{user_id}/permissions/{name}",
    operation_id="unset_permission",
    dependencies=[needs("admin.levels"), audits("user.permission.unset")],
    responses=error_responses("not_found", "last_admin"),
)
def unset_permission(core: CoreDep, identity: IdentityDep, user_id: UserId, name: str) -> UserView:
    """Leave it to the levels again."""
    check_reach(identity, known_permission(name))
    return _changed(core, core.store.users.set_permission(user_id, name, None))


def _changed(core: Core, user: UserRow) -> UserView:
    core.accounts.end_streams_of(user)
    return show_user(user)


def given(body: ProfileChange) -> dict[str, Any]:
    """What was written; null is no value for these but for a display name."""
    written = body.model_dump(exclude_unset=True)
    return {name: value for name, value in written.items() if value is not None or name == "display_name"}


def level_permissions(name: str) -> frozenset[str]:
    """Raises UserError `unknown_level`."""
    if name not in LEVELS:
        hint = did_you_mean(name, LEVELS) or f"Known: {', '.join(LEVELS)}."
        raise UserError("unknown_level", f"There is no level {name!r}.", hint=hint)
    return LEVELS[name].permissions


def known_permission(name: str) -> frozenset[str]:
    """Raises UserError `invalid_field`."""
    if name not in PERMISSIONS:
        message = f"There is no permission {name!r}."
        raise UserError("invalid_field", message, hint=did_you_mean(name, PERMISSIONS), pointer="/permission_name")
    return frozenset({name})


def find_user(core: Core, user_id: int) -> UserRow:
    """Raises UserError `not_found`."""
    user = core.store.users.get(user_id)
    if user is None:
        raise UserError("not_found", f"There is no user {user_id}.")
    return user


def reachable_user(core: Core, identity: Identity, user_id: int) -> UserRow:
    """One who may no more than the asker: whoever sets a password, has its user's rights."""
    user = find_user(core, user_id)
    check_reach(identity, rights_of_user(user))
    return user


def check_reach(identity: Identity, permissions: frozenset[str]) -> None:
    """Raises UserError `permission_denied`: nobody gives, or takes, what is not their own."""
    if missing := permissions - identity.permissions:
        raise denied(min(missing))


def _refuse_oneself(identity: Identity, user: UserRow) -> None:
    if identity.user_id == str(user.id):
        raise UserError("last_admin", "You cannot remove yourself.", hint="Ask another admin.")
