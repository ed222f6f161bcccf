"""The tables of accounts, in the state database."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, Index, Integer, String, Table, Text, UniqueConstraint

from simpletuner.store.schema import state_metadata

users = Table(
    "users",
    state_metadata,
    Column("id", Integer, primary_key=True),  # never used twice: jobs keep it
    Column("email", String(254), nullable=False),
    Column("email_key", String(254), nullable=False, unique=True),  # what two spellings have in common
    Column("username", String(50), nullable=False),
    Column("username_key", String(50), nullable=False, unique=True),
    Column("display_name", String(100)),
    Column("password_hash", Text, nullable=False),
    Column("is_active", Boolean, nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("last_login_at", String(32)),
    sqlite_autoincrement=True,
)

user_levels = Table(
    "user_levels",
    state_metadata,
    Column("user_id", Integer, nullable=False),
    Column("level", String(32), nullable=False),
    UniqueConstraint("user_id", "level", name="uq_user_levels_level"),
)

user_permissions = Table(
    "user_permissions",
    state_metadata,
    Column("user_id", Integer, nullable=False),
    Column("permission", String(64), nullable=False),
    Column("granted", Boolean, nullable=False),  # else denied
    UniqueConstraint("user_id", "permission", name="uq_user_permissions_permission"),
)

sessions = Table(
    "sessions",
    state_metadata,
    Column("id", Integer, primary_key=True),
    Column("token_hash", String(64), nullable=False, unique=True),  # SHA-256, as the next table's
    Column("user_id", Integer, nullable=False, index=True),
    Column("created_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
    sqlite_autoincrement=True,
)

api_keys = Table(
    "api_keys",
    state_metadata,
    Column("id", Integer, primary_key=True),
    Column("key_hash", String(64), nullable=False, unique=True),
    Column("prefix", String(16), nullable=False),  # for people to know it by
    Column("user_id", Integer, nullable=False, index=True),
    Column("name", String(100), nullable=False),
    Column("scope", JSON),  # globs of permissions
    Column("created_at", String(32), nullable=False),
    Column("expires_at", String(32)),
    Column("revoked_at", String(32)),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    state_metadata,
    Column("number", Integer, primary_key=True),
    Column("at", String(32), nullable=False),
    Column("actor_id", String(64)),
    Column("actor", String(254), nullable=False),  # a user's name; of a failed login the name that was given
    Column("action", String(48), nullable=False),
    Column("target", String(256)),
    Column("detail", JSON, nullable=False),
    Column("peer", String(64)),
    Column("request_id", String(64)),
    Index("ix_audit_at", "at"),
    sqlite_autoincrement=True,
)
