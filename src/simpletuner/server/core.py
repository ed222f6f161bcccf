"""What the routes work with. Built once, in `server/app.py`, and handed to each request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from simpletuner.errors import UserError
from simpletuner.jobs.devices import read_inventory
from simpletuner.jobs.executor import LocalExecutor
from simpletuner.jobs.feed import Feed
from simpletuner.jobs.placement import Placement
from simpletuner.jobs.supervisor import Supervisor
from simpletuner.server.security import Identity
from simpletuner.server.settings import ServerSettings
from simpletuner.server.stages import StageBoard
from simpletuner.store.job_row import JobRow
from simpletuner.store.store import Store


@dataclass(frozen=True, kw_only=True)
class Core:
    settings: ServerSettings
    store: Store
    placement: Placement
    supervisor: Supervisor
    feed: Feed
    stages: StageBoard
    started_at: float = field(default_factory=time.monotonic)

    @classmethod
    def build(cls, settings: ServerSettings, environ: Mapping[str, str]) -> Core:
        """Make the directories, open and migrate the databases, take the inventory."""
        for folder in (settings.config_dir, settings.datasets_dir):
            folder.mkdir(parents=True, exist_ok=True)
        settings.jobs_root.mkdir(parents=True, exist_ok=True)
        settings.state_dir.chmod(0o700)
        store = Store.open(settings.state_dir, database_url=settings.database_url)
        executor = LocalExecutor(environ)
        placement = Placement(store, executor, read_inventory(settings.devices, environ), settings.jobs_root)
        placement.remove_strays()
        feed = Feed()
        supervisor = Supervisor(store, executor, placement, feed)
        return cls(
            settings=settings,
            store=store,
            placement=placement,
            supervisor=supervisor,
            feed=feed,
            stages=StageBoard(store.events),
        )

    def job(self, job_id: str) -> JobRow:
        """Raises UserError `unknown_job`."""
        job = self.store.jobs.get(job_id)
        if job is None:
            raise UserError("unknown_job", f"There is no job {job_id}.")
        return job

    def close(self) -> None:
        self.store.close()


def _core(connection: HTTPConnection) -> Core:
    return connection.app.state.core


def _identity(connection: HTTPConnection) -> Identity:
    return connection.state.identity


CoreDep = Annotated[Core, Depends(_core)]
IdentityDep = Annotated[Identity, Depends(_identity)]
