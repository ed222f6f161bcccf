"""`simpletuner users`: accounts on a server, their levels and permissions."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from simpletuner.cli.client import Client, place
from simpletuner.cli.flags import NO_FLAGS, ServerFlags, Switch, columns, nothing_to_set
from simpletuner.cli.prompt import ask_password
from simpletuner.cli.refusal import ClientExit, Refusal

USERS = "/api/users"


def list_users(*, include_inactive: Switch = False, flags: ServerFlags = NO_FLAGS) -> int:
    """List users.

    Parameters
    ----------
    include_inactive
        Those who were deactivated too.
    """
    with flags.client() as client:
        for page in client.pages(USERS, include_inactive=include_inactive):
            flags.show(page, *columns(_row(user) for user in page))
    return 0


def show_user(who: str, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Show a user.

    Parameters
    ----------
    who
        User name, e-mail or number.
    """
    with flags.client() as client:
        return _show(flags, find_user(client, who))


def create_user(
    username: str,
    *,
    email: str,
    display_name: str | None = None,
    level: Annotated[list[str] | None, Parameter(negative="")] = None,
    admin: Switch = False,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Make a user. The password is asked for, or read as a line of stdin.

    Parameters
    ----------
    username
        3 to 50 letters, digits, '-' and '_'.
    email
        Address; one can log in with it too.
    display_name
        What people call them.
    level
        May be given more than once; researcher without it.
    admin
        The level admin too.
    """
    body: dict[str, Any] = {"username": username, "email": email, "display_name": display_name, "is_admin": admin}
    if level is not None:
        body["level_names"] = level
    body["password"] = ask_password("Password of the new user: ", twice=True)
    with flags.client() as client:
        return _show(flags, client.ask("POST", USERS, json=body))


def set_user(
    who: str,
    *,
    email: str | None = None,
    username: str | None = None,
    display_name: str | None = None,
    active: bool | None = None,
    admin: bool | None = None,
    password: Switch = False,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Change a user.

    Parameters
    ----------
    who
        User name, e-mail or number.
    email
        New address.
    username
        New user name.
    display_name
        What people call them; "" for none.
    active
        Deactivation ends sessions and keys at once.
    admin
        Give the level admin, or take it.
    password
        Ask for a new password, or read it as a line of stdin.
    """
    changes: dict[str, Any] = {"email": email, "username": username, "is_active": active, "is_admin": admin}
    changes = {name: value for name, value in changes.items() if value is not None}
    if display_name is not None:
        changes["display_name"] = display_name or None
    if password:
        changes["password"] = ask_password("New password: ", twice=True)
    if not changes:
        raise nothing_to_set("`simpletuner users set --help` lists what can be.")
    with flags.client() as client:
        user = find_user(client, who)
        return _show(flags, client.ask("PATCH", place(USERS, user["id"]), json=changes))


def delete_user(who: str, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Delete a user; jobs and environments stay.

    Parameters
    ----------
    who
        User name, e-mail or number.
    """
    with flags.client() as client:
        user = find_user(client, who)
        answer = client.ask("DELETE", place(USERS, user["id"]))
    return flags.show(answer, f"{user['username']} is deleted.")


def list_levels(*, flags: ServerFlags = NO_FLAGS) -> int:
    """List the levels that users can have."""
    with flags.client() as client:
        levels = client.ask("GET", f"{USERS}/meta/levels")
    return flags.show(levels, *columns((level["priority"], level["name"]) for level in levels))


def grant_level(who: str, level: str, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Give a user a level.

    Parameters
    ----------
    who
        User name, e-mail or number.
    level
        Of `users levels list`.
    """
    with flags.client() as client:
        return _show(flags, client.ask("POST", _path(client, who, "levels"), json={"level_name": level}))


def withdraw_level(who: str, level: str, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Take a level from a user.

    Parameters
    ----------
    who
        User name, e-mail or number.
    level
        Of `users levels list`.
    """
    with flags.client() as client:
        return _show(flags, client.ask("DELETE", _path(client, who, "levels", level)))


def list_permissions(*, flags: ServerFlags = NO_FLAGS) -> int:
    """List the permissions that there are."""
    with flags.client() as client:
        permissions = client.ask("GET", f"{USERS}/meta/permissions")
    return flags.show(permissions, *permissions)


def grant_permission(who: str, permission: str, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Give a user a permission beside those of the levels.

    Parameters
    ----------
    who
        User name, e-mail or number.
    permission
        Of `users permissions list`.
    """
    return _set_permission(who, permission, granted=True, flags=flags)


def deny_permission(who: str, permission: str, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Deny a user a permission, whatever the levels say.

    Parameters
    ----------
    who
        User name, e-mail or number.
    permission
        Of `users permissions list`.
    """
    return _set_permission(who, permission, granted=False, flags=flags)


def reset_permission(who: str, permission: str, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Leave a permission of a user to the levels again.

    Parameters
    ----------
    who
        User name, e-mail or number.
    permission
        Of `users permissions list`.
    """
    with flags.client() as client:
        return _show(flags, client.ask("DELETE", _path(client, who, "permissions", permission)))


def find_user(client: Client, who: str) -> dict[str, Any]:
    """By name, e-mail or number; the name first. Raises Refusal `not_found`."""
    found = [
        user
        for page in client.pages(USERS, include_inactive=True)
        for user in page
        if who in (user["username"], user["email"], user["id"])
    ]
    if not found:
        hint = "`simpletuner users list --include-inactive` lists them."
        raise Refusal("not_found", f"There is no user {who!r}.", ClientExit.REFUSED, hint=hint)
    return min(found, key=lambda user: user["username"] != who)


def _path(client: Client, who: str, *below: str) -> str:
    return place(USERS, find_user(client, who)["id"], *below)


def _set_permission(who: str, permission: str, *, granted: bool, flags: ServerFlags) -> int:
    body = {"permission_name": permission, "granted": granted}
    with flags.client() as client:
        return _show(flags, client.ask("POST", _path(client, who, "permissions"), json=body))


def _row(user: dict[str, Any]) -> tuple[object, ...]:
    levels = ",".join(level["name"] for level in user["levels"]) or None
    return user["id"], user["username"], user["email"], levels, "active" if user["is_active"] else "inactive"


def _show(flags: ServerFlags, user: dict[str, Any]) -> int:
    return flags.show(user, *columns([_row(user)]), f"  {' '.join(user['permissions'])}")
