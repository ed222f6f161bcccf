"""Small facts that survive a restart, such as the active environment."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, insert, select

from simpletuner.store.database import Database
from simpletuner.store.schema import settings

ACTIVE_ENVIRONMENT = "active_environment"
JOB_MAX_CONCURRENT = "local_job_max_concurrent"
REGISTRATION = "registration"
GPU_MAX_CONCURRENT = "local_gpu_max_concurrent"
CLOUD_MAX_CONCURRENT = "max_concurrent"
USER_MAX_CONCURRENT = "user_max_concurrent"
FAIR_SHARE = "enable_fair_share"


class SettingStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, name: str, default: Any = None) -> Any:
        """`default` only when nothing was stored: a stored null is null."""
        with self._database.read() as connection:
            row = connection.execute(select(settings.c.value).where(settings.c.name == name)).one_or_none()
        return default if row is None else row.value

    def all(self) -> dict[str, Any]:
        """What was stored, by name."""
        with self._database.read() as connection:
            return {row.name: row.value for row in connection.execute(select(settings))}

    def set(self, name: str, value: Any) -> None:
        with self._database.write() as connection:
            connection.execute(delete(settings).where(settings.c.name == name))
            connection.execute(insert(settings).values(name=name, value=value))
