"""Users with their levels and their own grants and denials. There is always an admin once there was one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, func, insert, or_, select, true, update
from sqlalchemy.exc import IntegrityError

from simpletuner.errors import UserError
from simpletuner.events import utc_now
from simpletuner.store.account_schema import api_keys, sessions, user_levels, user_permissions, users
from simpletuner.store.database import Database
from simpletuner.store.schema import settings

ADMIN_LEVEL = "admin"
FIRST_ADMIN = "first_admin"
"""The setting whose primary key lets one first admin in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewUser:
    email: str
    username: str
    password_hash: str
    display_name: str | None = None
    levels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRow:
    id: int
    email: str
    username: str
    display_name: str | None
    password_hash: str = field(repr=False)
    is_active: bool
    created_at: str
    last_login_at: str | None
    levels: tuple[str, ...]
    granted: frozenset[str]
    denied: frozenset[str]

    @property
    def is_admin(self) -> bool:
        return ADMIN_LEVEL in self.levels


@dataclass(frozen=True, slots=True)
class UserPage:
    users: list[UserRow]
    total: int


class UserStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, new: NewUser, *, as_first_admin: bool = False) -> UserRow:
        """Raises UserError `already_exists`; for the first admin also `setup_done`, of all but one of many at once."""
        with self._database.write() as connection:
            if as_first_admin:
                _claim_setup(connection)
            row = {
                "email": new.email,
                "email_key": key_of(new.email),
                "username": new.username,
                "username_key": key_of(new.username),
                "display_name": new.display_name,
                "password_hash": new.password_hash,
                "is_active": True,
                "created_at": utc_now(),
            }
            user_id = _insert_user(connection, row)
            for level in dict.fromkeys(new.levels):
                _hold(connection, user_id, level, True)
            return _get(connection, user_id)

    def has_admin(self) -> bool:
        with self._database.read() as connection:
            return _has_admin(connection)

    def count(self) -> int:
        with self._database.read() as connection:
            return connection.scalar(select(func.count()).select_from(users)) or 0

    def get(self, user_id: int) -> UserRow | None:
        with self._database.read() as connection:
            found = _read(connection, users.c.id == user_id)
        return found[0] if found else None

    def by_login(self, name: str) -> UserRow | None:
        """By user name or e-mail address; letter case does not matter."""
        key = key_of(name)
        with self._database.read() as connection:
            found = _read(connection, or_(users.c.username_key == key, users.c.email_key == key))
        return found[0] if found else None

    def find(self, *, include_inactive: bool, limit: int, offset: int) -> UserPage:
        """In order of creation."""
        wanted = true() if include_inactive else users.c.is_active.is_(True)
        with self._database.read() as connection:
            total = connection.scalar(select(func.count()).select_from(users).where(wanted)) or 0
            return UserPage(_read(connection, wanted, limit=limit, offset=offset), total)

    def change(self, user_id: int, changes: Mapping[str, Any]) -> UserRow:
        """`changes` by column, and `is_admin`. Deactivation, and a new password, end what proves who they are.

        Raises UserError `not_found`, `already_exists` or `last_admin`, with nothing changed.
        """
        values = dict(changes)
        is_admin = values.pop("is_admin", None)
        for name in ("email", "username"):
            if name in values:
                values[f"{name}_key"] = key_of(values[name])
        with self._database.write() as connection:
            _get(connection, user_id)
            if values:
                _unique_update(connection, user_id, values)
            if is_admin is not None:
                _hold(connection, user_id, ADMIN_LEVEL, is_admin)
            if values.get("is_active") is False:
                _end_credentials(connection, user_id)
            if "password_hash" in values:
                connection.execute(delete(sessions).where(sessions.c.user_id == user_id))
            _require_admin(connection)
            return _get(connection, user_id)

    def change_password(self, user_id: int, password_hash: str, *, keep_session: int | None) -> None:
        """Other sessions end."""
        with self._database.write() as connection:
            connection.execute(update(users).where(users.c.id == user_id).values(password_hash=password_hash))
            ended = delete(sessions).where(sessions.c.user_id == user_id, sessions.c.id != (keep_session or 0))
            connection.execute(ended)

    def note_login(self, user_id: int) -> None:
        with self._database.write() as connection:
            connection.execute(update(users).where(users.c.id == user_id).values(last_login_at=utc_now()))

    def delete(self, user_id: int) -> None:
        """Jobs and audit entries keep the id. Raises UserError `not_found` or `last_admin`."""
        with self._database.write() as connection:
            _get(connection, user_id)
            for table in (user_levels, user_permissions, sessions, api_keys):
                connection.execute(delete(table).where(table.c.user_id == user_id))
            connection.execute(delete(users).where(users.c.id == user_id))
            _require_admin(connection)

    def set_level(self, user_id: int, level: str, held: bool) -> UserRow:
        """Raises UserError `not_found` or `last_admin`."""
        with self._database.write() as connection:
            _get(connection, user_id)
            _hold(connection, user_id, level, held)
            _require_admin(connection)
            return _get(connection, user_id)

    def set_permission(self, user_id: int, permission: str, granted: bool | None) -> UserRow:
        """Grant, deny, or with None leave it to the levels. Raises UserError `not_found` or `last_admin`."""
        table = user_permissions
        with self._database.write() as connection:
            _get(connection, user_id)
            connection.execute(delete(table).where(table.c.user_id == user_id, table.c.permission == permission))
            if granted is not None:
                values = {"user_id": user_id, "permission": permission, "granted": granted}
                connection.execute(insert(table).values(values))
            _require_admin(connection)
            return _get(connection, user_id)


def key_of(name: str) -> str:
    return name.strip().casefold()


def _has_admin(connection: Connection) -> bool:
    return connection.scalar(select(settings.c.name).where(settings.c.name == FIRST_ADMIN)) is not None


def _claim_setup(connection: Connection) -> None:
    try:
        connection.execute(insert(settings).values(name=FIRST_ADMIN, value=utc_now()))
    except IntegrityError as error:
        raise setup_done() from error


def setup_done() -> UserError:
    return UserError("setup_done", "The first admin exists already.", hint="Log in.")


def _taken() -> UserError:
    return UserError("already_exists", "A user with this name or e-mail address exists already.")


def _insert_user(connection: Connection, row: Mapping[str, Any]) -> int:
    try:
        key = connection.execute(insert(users).values(**row)).inserted_primary_key
    except IntegrityError as error:
        raise _taken() from error
    if key is None:
        raise LookupError("the database gave no id to a user")
    return int(key[0])


def _unique_update(connection: Connection, user_id: int, values: Mapping[str, Any]) -> None:
    try:
        connection.execute(update(users).where(users.c.id == user_id).values(**values))
    except IntegrityError as error:
        raise _taken() from error


def _hold(connection: Connection, user_id: int, level: str, held: bool) -> None:
    table = user_levels
    connection.execute(delete(table).where(table.c.user_id == user_id, table.c.level == level))
    if held:
        connection.execute(insert(table).values(user_id=user_id, level=level))
    if held and level == ADMIN_LEVEL and not _has_admin(connection):
        _claim_setup(connection)


def _end_credentials(connection: Connection, user_id: int) -> None:
    connection.execute(delete(sessions).where(sessions.c.user_id == user_id))
    living = (api_keys.c.user_id == user_id, api_keys.c.revoked_at.is_(None))
    connection.execute(update(api_keys).where(*living).values(revoked_at=utc_now()))


def _require_admin(connection: Connection) -> None:
    """One who is active, and whom nothing is denied; as soon as there was one."""
    if not _has_admin(connection):
        return
    denied = exists().where(user_permissions.c.user_id == users.c.id, user_permissions.c.granted.is_(False))
    admins = (
        select(users.c.id)
        .join(user_levels, user_levels.c.user_id == users.c.id)
        .where(users.c.is_active.is_(True), user_levels.c.level == ADMIN_LEVEL, ~denied)
        .limit(1)
    )
    if connection.scalar(admins) is None:
        hint = "Make another user an admin first."
        raise UserError("last_admin", "No admin with all rights would be left.", hint=hint)


def _get(connection: Connection, user_id: int) -> UserRow:
    found = _read(connection, users.c.id == user_id)
    if not found:
        raise UserError("not_found", f"There is no user {user_id}.")
    return found[0]


def _read(
    connection: Connection, wanted: ColumnElement[bool], *, limit: int | None = None, offset: int = 0
) -> list[UserRow]:
    rows = connection.execute(select(users).where(wanted).order_by(users.c.id).limit(limit).offset(offset)).all()
    ids = [row.id for row in rows]
    levels = connection.execute(select(user_levels).where(user_levels.c.user_id.in_(ids))).all()
    own = connection.execute(select(user_permissions).where(user_permissions.c.user_id.in_(ids))).all()
    return [
        UserRow(
            id=row.id,
            email=row.email,
            username=row.username,
            display_name=row.display_name,
            password_hash=row.password_hash,
            is_active=row.is_active,
            created_at=row.created_at,
            last_login_at=row.last_login_at,
            levels=tuple(each.level for each in levels if each.user_id == row.id),
            granted=frozenset(_permissions(own, row.id, granted=True)),
            denied=frozenset(_permissions(own, row.id, granted=False)),
        )
        for row in rows
    ]


def _permissions(rows: Sequence[Any], user_id: int, *, granted: bool) -> Iterable[str]:
    return (row.permission for row in rows if row.user_id == user_id and row.granted is granted)
