"""Opens a database and brings it to the newest schema."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from simpletuner.errors import ExitCode, UserError

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_S = 10.0


class Database:
    """One database: `read` gives a snapshot, `write` one transaction that is alone from its first statement."""

    def __init__(self, url: str) -> None:
        self.engine = _build_engine(url)
        self._writing = self.engine.execution_options(writes=True)

    @classmethod
    def open(cls, url: str, branch: Literal["state", "events"]) -> Database:
        """Open `url` and run the migrations of `branch`."""
        database = cls(url)
        try:
            with database.write() as connection:
                upgrade(connection, branch)
        except sqlite3.DatabaseError as error:
            raise UserError("storage", f"Cannot open {url}: {error}.", exit_code=ExitCode.STORAGE) from error
        return database

    @contextmanager
    def read(self) -> Generator[Connection]:
        with self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Generator[Connection]:
        """Raises OSError when the disk is full, like every other writer."""
        try:
            with self._writing.begin() as connection:
                yield connection
        except OperationalError as error:
            if isinstance(error.orig, sqlite3.Error) and error.orig.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, "the database's disk is full") from error
            raise

    def close(self) -> None:
        self.engine.dispose()


def upgrade(connection: Connection, branch: str) -> None:
    """Run what is missing of the migrations of `branch`."""
    if _revision(connection) == newest_revision(branch):
        return
    # A tenth of a server's start, and most starts have nothing to migrate.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.set_main_option("version_locations", str(MIGRATIONS / branch).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def newest_revision(branch: str) -> str:
    """By the files' names: `0003_accounts.py` of `state` is `state_0003`."""
    newest = max(path.name for path in (MIGRATIONS / branch).glob("[0-9]*.py"))
    return f"{branch}_{newest.partition('_')[0]}"


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()


def _build_engine(url: str) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    # The driver's own idea of transactions would start them late; ours begin when we say so.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A deferred transaction that turns into a writer fails at once when another one wrote meanwhile.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
