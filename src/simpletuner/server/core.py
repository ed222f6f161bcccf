"""What the routes work with. Built once, in `server/app.py`, and handed to each request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from simpletuner.config.directories import Directories
from simpletuner.config.environments import Environments, to_json
from simpletuner.errors import UserError
from simpletuner.events import AnyData, Event, EventType, utc_now
from simpletuner.job import write_atomic
from simpletuner.jobs.device_memory import MemoryGauge
from simpletuner.jobs.devices import read_inventory
from simpletuner.jobs.executor import LocalExecutor
from simpletuner.jobs.feed import Feed
from simpletuner.jobs.fleet import Fleet
from simpletuner.jobs.foreground import ForegroundOutbox
from simpletuner.jobs.job_token import JobTokens
from simpletuner.jobs.leases import Leases
from simpletuner.jobs.placement import Placement
from simpletuner.jobs.remote import RemoteExecutor
from simpletuner.jobs.shipment import Shipments
from simpletuner.jobs.supervisor import Supervisor
from simpletuner.jobs.webhook_post import Poster
from simpletuner.jobs.webhook_target import TargetRules
from simpletuner.jobs.webhooks import Courier
from simpletuner.server.accounts import Accounts
from simpletuner.server.deep import DeepValidation
from simpletuner.server.identity import Identity
from simpletuner.server.input_shelf import InputShelf
from simpletuner.server.ledger import LedgerScans
from simpletuner.server.rate_limit import RateLimiter
from simpletuner.server.settings import ServerSettings
from simpletuner.server.stages import StageBoard
from simpletuner.server.uploads.reception import Reception
from simpletuner.store.job_row import JobRow
from simpletuner.store.settings import ACTIVE_ENVIRONMENT
from simpletuner.store.store import Store

WEBHOOK_TEMPLATE = [{"webhook_type": "raw", "callback_url": "https://example.com/simpletuner", "log_level": "info"}]


@dataclass(frozen=True, kw_only=True)
class Core:
    settings: ServerSettings
    store: Store
    placement: Placement
    supervisor: Supervisor
    feed: Feed
    stages: StageBoard
    environments: Environments
    directories: Directories
    poster: Poster
    foreground: ForegroundOutbox
    couriers: tuple[Courier, ...]
    accounts: Accounts
    reception: Reception
    ledgers: LedgerScans
    deep: DeepValidation
    fleet: Fleet
    leases: Leases
    remote: RemoteExecutor
    job_tokens: JobTokens
    inputs: InputShelf
    shipments: Shipments = field(default_factory=Shipments)
    limiter: RateLimiter = field(default_factory=RateLimiter)
    started_at: float = field(default_factory=time.monotonic)
    served_since: str = field(default_factory=utc_now)

    @classmethod
    def build(cls, settings: ServerSettings, environ: Mapping[str, str]) -> Core:
        """Make the directories, open and migrate the databases, take the inventory."""
        if not settings.config_dir.exists():
            settings.config_dir.mkdir(parents=True)
            write_atomic(settings.config_dir / "webhooks.json", to_json(WEBHOOK_TEMPLATE))
        settings.datasets_dir.mkdir(parents=True, exist_ok=True)
        settings.jobs_root.mkdir(parents=True, exist_ok=True)
        settings.state_dir.chmod(0o700)
        store = Store.open(
            settings.state_dir, database_url=settings.database_url, audit_kept_days=settings.audit_kept_days
        )
        devices = read_inventory(settings.devices, environ)
        executor = LocalExecutor(environ, num_slots=len(devices))
        fleet = Fleet(store, settings.timers)
        leases = Leases(settings.timers.lease_s, store.assignments.live())
        remote = RemoteExecutor(store, leases, fleet)
        gauge = None if settings.devices.strip().startswith("[") else MemoryGauge(devices)
        placement = Placement(
            store, executor, devices, settings.jobs_root,
            gauge=gauge, remote=remote, worker_slots=fleet.slots, preempts=settings.preemption,
        )  # fmt: skip
        placement.remove_strays()
        feed = Feed()
        supervisor = Supervisor(store, executor, placement, feed, each_second=fleet.round)
        rules = TargetRules(allow_private=settings.webhook_allow_private, own_port=settings.port)
        poster = Poster(rules)
        foreground = ForegroundOutbox.open(settings.foreground_root)
        reception = Reception(settings.datasets_dir, settings.uploads_root, most_bytes=settings.max_upload_bytes)
        reception.recover()
        couriers = (Courier(store.webhooks, poster, settings.jobs_root), foreground.abandoned_courier(poster))
        return cls(
            settings=settings,
            store=store,
            placement=placement,
            supervisor=supervisor,
            feed=feed,
            stages=StageBoard(store.events),
            environments=Environments(settings.config_dir),
            directories=Directories(settings.workspace, settings.config_dir),
            poster=poster,
            foreground=foreground,
            couriers=couriers,
            accounts=Accounts(store, settings.state_dir),
            reception=reception,
            ledgers=LedgerScans(settings.workspace, environ),
            deep=DeepValidation(settings.workspace, environ),
            fleet=fleet,
            leases=leases,
            remote=remote,
            inputs=InputShelf(leases),
            job_tokens=JobTokens.open(settings.state_dir / "job-token-key"),
        )

    def job(self, job_id: str) -> JobRow:
        """Raises UserError `unknown_job`."""
        job = self.store.jobs.get(job_id)
        if job is None:
            raise UserError("unknown_job", f"There is no job {job_id}.")
        return job

    def active_environment(self) -> str | None:
        """Stored, never implied; None when it is gone from the disk."""
        name = self.store.settings.get(ACTIVE_ENVIRONMENT)
        return name if name in self.environments.names() else None

    def activate(self, name: str | None) -> None:
        """Raises UserError `unknown_config`."""
        if name is not None:
            self.environments.folder(name)
        self.store.settings.set(ACTIVE_ENVIRONMENT, name)
        self.announce_config(name or "", "activated" if name else "deactivated")

    def announce_config(self, name: str, what: str) -> None:
        data = AnyData.model_validate({"name": name, "change": what})
        self.store.outbox.put(Event(type=EventType.CONFIG_UPDATED, message=f"Environment {name} {what}", data=data))
        self.supervisor.wake()

    def end_waits(self) -> None:
        """Of streams and held requests, so that a server can go down without waiting for those who listen."""
        self.feed.close()
        self.fleet.bell.close()
        self.remote.bell.close()

    def close(self) -> None:
        self.inputs.close()
        self.foreground.close()
        self.store.close()


async def _core(connection: HTTPConnection) -> Core:
    return connection.app.state.core


async def _identity(connection: HTTPConnection) -> Identity:
    return connection.state.identity


async def _maybe_identity(connection: HTTPConnection) -> Identity | None:
    return connection.state.identity


CoreDep = Annotated[Core, Depends(_core)]
IdentityDep = Annotated[Identity, Depends(_identity)]
MaybeIdentityDep = Annotated[Identity | None, Depends(_maybe_identity)]
"""Of public routes, where nobody may ask too."""
