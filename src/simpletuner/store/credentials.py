"""Sessions and API keys, by the hashes of their secrets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, insert, or_, select, update

from simpletuner.errors import UserError
from simpletuner.events import utc_now
from simpletuner.store.account_schema import api_keys, sessions, users
from simpletuner.store.database import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRow:
    """`scope` holds globs of permissions, None for all that its user may do."""

    id: int
    prefix: str
    user_id: int
    name: str
    scope: tuple[str, ...] | None
    created_at: str
    expires_at: str | None
    revoked_at: str | None


@dataclass(frozen=True, slots=True)
class SessionRow:
    id: int
    user_id: int


class CredentialStore:
    """Times are RFC 3339 UTC, which sort as text."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_session(self, user_id: int, token_hash: str, *, expires_at: str) -> None:
        """Those that ran out are removed on the way."""
        now = utc_now()
        row = {"token_hash": token_hash, "user_id": user_id, "created_at": now, "expires_at": expires_at}
        with self._database.write() as connection:
            connection.execute(delete(sessions).where(sessions.c.expires_at <= now))
            connection.execute(insert(sessions).values(row))

    def session(self, token_hash: str, *, now: str) -> SessionRow | None:
        """Of an active user, while it lasts."""
        joined = select(sessions.c.id, sessions.c.user_id).join(users, users.c.id == sessions.c.user_id)
        living = (sessions.c.token_hash == token_hash, sessions.c.expires_at > now, users.c.is_active.is_(True))
        with self._database.read() as connection:
            row = connection.execute(joined.where(*living)).one_or_none()
        return SessionRow(row.id, row.user_id) if row else None

    def end_session(self, token_hash: str) -> int | None:
        """The id of the one that ended."""
        with self._database.write() as connection:
            ended = connection.scalar(select(sessions.c.id).where(sessions.c.token_hash == token_hash))
            connection.execute(delete(sessions).where(sessions.c.token_hash == token_hash))
        return ended

    def add_key(
        self,
        user_id: int,
        key_hash: str,
        *,
        prefix: str,
        name: str,
        scope: Sequence[str] | None,
        expires_at: str | None,
    ) -> KeyRow:
        values: dict[str, Any] = {
            "key_hash": key_hash,
            "prefix": prefix,
            "user_id": user_id,
            "name": name,
            "scope": None if scope is None else list(scope),
            "created_at": utc_now(),
            "expires_at": expires_at,
        }
        with self._database.write() as connection:
            connection.execute(insert(api_keys).values(values))
            row = connection.execute(select(api_keys).where(api_keys.c.key_hash == key_hash)).one()
        return _key(row)

    def key(self, key_hash: str, *, now: str) -> KeyRow | None:
        """Of an active user, while it lasts."""
        living = (
            api_keys.c.key_hash == key_hash,
            api_keys.c.revoked_at.is_(None),
            or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now),
            users.c.is_active.is_(True),
        )
        joined = select(api_keys).join(users, users.c.id == api_keys.c.user_id).where(*living)
        with self._database.read() as connection:
            row = connection.execute(joined).one_or_none()
        return _key(row) if row else None

    def keys_of(self, user_id: int) -> list[KeyRow]:
        """Newest first, revoked ones too."""
        wanted = select(api_keys).where(api_keys.c.user_id == user_id).order_by(api_keys.c.id.desc())
        with self._database.read() as connection:
            return [_key(row) for row in connection.execute(wanted).all()]

    def get_key(self, key_id: int) -> KeyRow:
        """Raises UserError `not_found`."""
        with self._database.read() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise no_key(key_id)
        return _key(row)

    def revoke_key(self, key_id: int) -> None:
        living = (api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        with self._database.write() as connection:
            connection.execute(update(api_keys).where(*living).values(revoked_at=utc_now()))


def no_key(key_id: int) -> UserError:
    return UserError("not_found", f"There is no API key {key_id}.")


def _key(row: Row[Any]) -> KeyRow:
    return KeyRow(
        id=row.id,
        prefix=row.prefix,
        user_id=row.user_id,
        name=row.name,
        scope=None if row.scope is None else tuple(row.scope),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
