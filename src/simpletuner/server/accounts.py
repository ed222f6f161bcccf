"""Accounts: the first admin, logins, sessions and keys (api.md §1.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from simpletuner.errors import UserError
from simpletuner.events import as_text
from simpletuner.server.identity import Identity
from simpletuner.server.open_streams import OpenStreams
from simpletuner.server.passwords import Passwords
from simpletuner.server.permission import ACCESS, base_priority_of, rights_of, within
from simpletuner.server.rate_limit import LoginBackoff
from simpletuner.server.setup_token import SetupToken, random_text
from simpletuner.store.credentials import KeyRow
from simpletuner.store.store import Store
from simpletuner.store.users import NewUser, UserRow, key_of

KEY_START = "st_"
KEY_CHARS = 32
SHOWN_CHARS = len(KEY_START) + 8
SESSION_CHARS = 43
SHORT_SESSION = timedelta(hours=24)
LONG_SESSION = timedelta(days=30)


class Accounts:
    """`clock` gives the time in UTC."""

    def __init__(
        self,
        store: Store,
        state_dir: Path,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        backoff: LoginBackoff | None = None,
    ) -> None:
        self.setup_token = SetupToken(state_dir)
        self.streams = OpenStreams()
        self._users = store.users
        self._credentials = store.credentials
        self._passwords = Passwords()
        self._is_set_up = False
        self._clock = clock
        self._backoff = backoff or LoginBackoff()

    def has_admin(self) -> bool:
        """Asked at every request; the first admin is made once and for all."""
        self._is_set_up = self._is_set_up or self._users.has_admin()
        return self._is_set_up

    def prepare_setup(self) -> str | None:
        """At a start: a new setup token, or None where there is an admin."""
        if self.has_admin():
            self.setup_token.forget()
            return None
        return self.setup_token.issue()

    def create_user(
        self,
        *,
        email: str,
        username: str,
        password: str,
        display_name: str | None = None,
        levels: Sequence[str] = (),
        as_first_admin: bool = False,
    ) -> UserRow:
        """Raises UserError `already_exists` or `setup_done`. As soon as there is an admin, the open identity ends."""
        new = NewUser(
            email=email.strip(),
            username=username,
            password_hash=self._passwords.hash(password),
            display_name=display_name,
            levels=tuple(levels),
        )
        user = self._users.create(new, as_first_admin=as_first_admin)
        self.end_open_identity(user)
        return user

    def end_open_identity(self, user: UserRow) -> None:
        """Of the server, as soon as a user is an admin."""
        if user.is_admin:
            self.setup_token.forget()
            self.streams.end(lambda identity: identity.by == "loopback")

    def log_in(self, name: str, password: str) -> UserRow:
        """Raises UserError `invalid_credentials`, after equal time whether the user exists or not; or RateLimited."""
        user = self._users.by_login(name)
        account = key_of(user.username if user else name)
        self._backoff.check(account)
        matches = self._passwords.matches(password, user.password_hash if user else None)
        if user is None or not matches or not user.is_active:
            self._backoff.fail(account)
            raise UserError("invalid_credentials", "User name or password is wrong.")
        self._backoff.succeed(account)
        self._users.note_login(user.id)
        return user

    def change_password(self, identity: Identity, current: str, new: str) -> None:
        """Other sessions end. Raises UserError `invalid_credentials`."""
        user = self.user(identity)
        if not self._passwords.matches(current, user.password_hash):
            raise UserError("invalid_credentials", "The current password is wrong.", pointer="/current_password")
        kept = identity.credential_id if identity.by == "session" else None
        self._users.change_password(user.id, self._passwords.hash(new), keep_session=kept)
        self.streams.end(lambda other: _is_other_session(other, identity))

    def change_user(self, user_id: int, changes: Mapping[str, Any]) -> UserRow:
        """`changes` may hold a `password`. Raises as `UserStore.change`."""
        values = {name: value for name, value in changes.items() if name != "password"}
        if "password" in changes:
            values["password_hash"] = self._passwords.hash(changes["password"])
        user = self._users.change(user_id, values)
        self.end_streams_of(user)
        return user

    def end_streams_of(self, user: UserRow) -> None:
        """After a change of what the user may see; an open page asks again."""
        self.streams.end(lambda identity: identity.user_id == str(user.id))
        self.end_open_identity(user)

    def user(self, identity: Identity) -> UserRow:
        """Raises UserError `permission_denied` for the open identity, which is nobody's account."""
        found = self._users.get(int(identity.user_id)) if identity.by != "loopback" else None
        if found is None:
            hint = "Create an admin and log in."
            raise UserError("permission_denied", "The open identity of this machine has no account.", hint=hint)
        return found

    def open_session(self, user: UserRow, *, long: bool) -> tuple[str, int]:
        """The token of its cookie, which is kept nowhere, and its seconds."""
        lasts = LONG_SESSION if long else SHORT_SESSION
        token = random_text(SESSION_CHARS)
        self._credentials.add_session(user.id, hash_secret(token), expires_at=as_text(self._clock() + lasts))
        return token, int(lasts.total_seconds())

    def end_session(self, token: str) -> None:
        ended = self._credentials.end_session(hash_secret(token))
        self.streams.end(lambda identity: identity.by == "session" and identity.credential_id == ended)

    def create_key(
        self, user: UserRow, *, name: str, scope: Sequence[str] | None, expires_days: int | None
    ) -> tuple[str, KeyRow]:
        """The key, which is kept nowhere, and its row."""
        key = KEY_START + random_text(KEY_CHARS)
        expires_at = None if expires_days is None else as_text(self._clock() + timedelta(days=expires_days))
        row = self._credentials.add_key(
            user.id, hash_secret(key), prefix=key[:SHOWN_CHARS], name=name, scope=scope, expires_at=expires_at
        )
        return key, row

    def revoke_key(self, key_id: int) -> None:
        self._credentials.revoke_key(key_id)
        self.streams.end(lambda identity: identity.by == "key" and identity.credential_id == key_id)

    def identify_key(self, key: str) -> Identity | None:
        row = self._credentials.key(hash_secret(key), now=as_text(self._clock()))
        return None if row is None else self._identity(row.user_id, "key", row.id, row.scope)

    def identify_session(self, token: str) -> Identity | None:
        row = self._credentials.session(hash_secret(token), now=as_text(self._clock()))
        return None if row is None else self._identity(row.user_id, "session", row.id, None)

    def _identity(
        self, user_id: int, by: Literal["session", "key"], credential_id: int, scope: tuple[str, ...] | None
    ) -> Identity | None:
        user = self._users.get(user_id)
        if user is None:
            return None
        rights = rights_of_user(user)
        return Identity(
            user_id=str(user.id),
            name=user.username,
            by=by,
            permissions=rights if scope is None else within(rights, scope),
            has_access=ACCESS in rights,
            is_admin=user.is_admin and scope is None,
            scope=scope,
            credential_id=credential_id,
            base_priority=base_priority_of(user.levels),
        )


def rights_of_user(user: UserRow) -> frozenset[str]:
    return rights_of(user.levels, user.granted, user.denied)


def hash_secret(secret: str) -> str:
    """Of long random text: no salt and no work factor is needed."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _is_other_session(other: Identity, identity: Identity) -> bool:
    own = identity.by == "session" and other.credential_id == identity.credential_id
    return other.by == "session" and other.user_id == identity.user_id and not own
