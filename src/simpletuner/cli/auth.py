"""`simpletuner auth`: log in at a server, and the API keys of who is logged in."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated, Any

from cyclopts import Parameter

from simpletuner.cli.client import KEY_VARIABLE, Client, server_url
from simpletuner.cli.flags import NO_FLAGS, ServerFlags, Switch, columns
from simpletuner.cli.keys import KeyFile, StoredKey
from simpletuner.cli.prompt import ask_line, ask_password
from simpletuner.cli.refusal import ClientExit, Refusal

KEYS = "/api/auth/api-keys"
NAME_CHARS = 100
LASTS_DAYS = 1
REMEMBERED_DAYS = 30
"""As long as a browser's session without and with "remember me"."""


def login(username: str | None = None, *, remember_me: Switch = False, flags: ServerFlags = NO_FLAGS) -> int:
    """Log in: a key of your own for this machine, kept in the key file, for a day.

    Parameters
    ----------
    username
        User name or e-mail; asked for without it. The password is asked for, or read as a line of stdin.
    remember_me
        The key lasts 30 days.
    """
    key_file = KeyFile.of(os.environ)
    replaced = key_file.get(server_url(os.environ, flags.url))
    name = username or ask_line("User name: ")
    credentials = {"username": name, "password": ask_password(), "remember_me": remember_me}
    wanted = {
        "name": f"cli@{socket.gethostname()}"[:NAME_CHARS],
        "expires_days": REMEMBERED_DAYS if remember_me else LASTS_DAYS,
    }
    with flags.client(key="") as client:
        answer = client.ask("POST", "/api/auth/login", json=credentials)
        try:
            made = client.ask("POST", KEYS, json=wanted)
        finally:
            client.ask("POST", "/api/auth/logout")
    info, user = made["key_info"], answer["user"]
    key_file.put(client.url, StoredKey(key=made["key"], id=info["id"], name=info["name"], username=user["username"]))
    if replaced is not None:
        _revoke(client.url, replaced)
    _warn_of_variable()
    shown = {"success": True, "user": user, "key_info": info}
    until = f"until {info['expires_at']}"
    return flags.show(shown, f"Logged in at {client.url} as {user['username']}, with key {info['name']} {until}.")


def logout(*, flags: ServerFlags = NO_FLAGS) -> int:
    """Revoke the key of `auth login` and forget it."""
    key_file, url = KeyFile.of(os.environ), server_url(os.environ, flags.url)
    stored = key_file.get(url)
    if stored is None:
        return flags.show({"success": True}, f"No key is stored for {url}.")
    _revoke(url, stored)
    key_file.drop(url)
    _warn_of_variable()
    return flags.show({"success": True}, f"Logged out of {url}: key {stored.name} is revoked.")


def whoami(*, flags: ServerFlags = NO_FLAGS) -> int:
    """Who you are at the server, and what you may."""
    with flags.client() as client:
        user = client.ask("GET", "/api/auth/me")
    levels = ", ".join(level["name"] for level in user["levels"])
    return flags.show(
        user, f"{user['username']} ({levels or 'no level'}) at {client.url}", f"  {' '.join(user['permissions'])}"
    )


def list_keys(*, flags: ServerFlags = NO_FLAGS) -> int:
    """List your API keys, newest first."""
    with flags.client() as client:
        keys = client.ask("GET", KEYS)
    return flags.show(keys, *columns(_key_row(key) for key in keys))


def create_key(
    name: str,
    *,
    expires_days: int | None = None,
    scope: Annotated[list[str] | None, Parameter(negative="")] = None,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Make an API key and print it, this once.

    Parameters
    ----------
    name
        What it is for.
    expires_days
        1 to 365; without it the key does not end by itself.
    scope
        Permissions that it is limited to, as globs such as `job.*`; may be given more than once.
    """
    wanted = {"name": name, "expires_days": expires_days, "scoped_permissions": scope}
    with flags.client() as client:
        made = client.ask("POST", KEYS, json=wanted)
    return flags.show(made, made["key"])


def revoke_key(key_id: int, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Revoke an API key, at once.

    Parameters
    ----------
    key_id
        The number in `auth keys list`.
    """
    with flags.client() as client:
        answer = client.ask("DELETE", f"{KEYS}/{key_id}")
    key_file = KeyFile.of(os.environ)
    stored = key_file.get(client.url)
    if stored is not None and stored.id == key_id:
        key_file.drop(client.url)
    return flags.show(answer, f"Key {key_id} is revoked.")


def _revoke(url: str, stored: StoredKey) -> None:
    """A key that is no longer valid, or whose user is gone, needs none."""
    with Client(os.environ, url=url, key=stored.key) as client:
        try:
            client.ask("DELETE", f"{KEYS}/{stored.id}")
        except Refusal as error:
            if error.client_exit is ClientExit.UNREACHABLE:
                raise


def _key_row(key: dict[str, Any]) -> tuple[object, ...]:
    state = "revoked" if key["revoked_at"] else f"until {key['expires_at']}" if key["expires_at"] else "no end"
    scope = key["scoped_permissions"]
    return key["id"], key["prefix"], key["name"], state, "everything" if scope is None else " ".join(scope)


def _warn_of_variable() -> None:
    if os.environ.get(KEY_VARIABLE):
        print(f"warning: {KEY_VARIABLE} is set, and is used before the key file.", file=sys.stderr)
