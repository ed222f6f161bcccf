"""The application in this process, with users of every level; no server, and nothing is trained."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
from control_world import FAKE_TRAINER

from simpletuner.job import JobStatus, new_job_id
from simpletuner.server.app import create_app
from simpletuner.server.core import Core
from simpletuner.server.permission import LEVELS
from simpletuner.server.settings import ServerSettings
from simpletuner.store.job_row import JobRow, Move, NewJob
from simpletuner.store.users import UserRow

PASSWORD = "a-long-password"


class AccountWorld:
    """No supervisor runs."""

    def __init__(self, workspace: Path, **flags: str | bool) -> None:
        settings = ServerSettings.read(
            {"workspace": str(workspace), **flags}, {"SIMPLETUNER_DEVICES": "cpu:1"}, workspace
        )
        self.core = Core.build(settings, {"SIMPLETUNER_TRAINER": str(FAKE_TRAINER)})
        self.app = create_app(settings, core=self.core)
        self.app.state.core = self.core
        self.workspace = workspace
        self.loop = asyncio.Runner()
        self.users: dict[str, UserRow] = {}
        self.keys: dict[str, str] = {}
        self._num_asked = 0

    def occupy(self) -> None:
        """The only device: what is started from now on waits in the queue."""
        job = self.insert_job("local")
        move = Move(job_id=job.job_id, from_=JobStatus.QUEUED, to=JobStatus.STARTING, attempt=1, devices=(0,))
        assert self.core.store.jobs.move(move)

    def add_users(self, *levels: str) -> None:
        """One of each level, called by its name; the admin first."""
        for level in sorted(levels, key=lambda name: -LEVELS[name].priority):
            self.add_user(level, level)

    def add_user(self, name: str, *levels: str) -> UserRow:
        user = self.core.accounts.create_user(
            email=f"{name}@example.com", username=name, password=PASSWORD, levels=levels
        )
        self.users[name] = user
        self.keys[name] = self.make_key(name)
        return user

    def make_key(self, name: str, *, scope: list[str] | None = None, expires_days: int | None = None) -> str:
        return self.core.accounts.create_key(self.users[name], name=name, scope=scope, expires_days=expires_days)[0]

    def insert_job(self, user_id: str) -> JobRow:
        output = self.workspace / "output" / "demo"
        return self.core.store.jobs.insert(NewJob(job_id=new_job_id(), output_dir=str(output), user_id=user_id))

    def ask(
        self,
        method: str,
        url: str,
        *,
        by: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        peer: str | None = None,
        **more: Any,
    ) -> httpx2.Response:
        """`by` a user's whole key, or with `key`; every request has a peer of its own unless it is given."""
        self._num_asked += 1
        peer = peer or f"10.{self._num_asked >> 16}.{self._num_asked >> 8 & 255}.{self._num_asked & 255}"
        key = self.keys[by] if by else key
        sent = dict(headers or {}) | ({"X-API-Key": key} if key else {})
        transport = httpx2.ASGITransport(app=self.app, client=(peer, 1))

        async def ask_once() -> httpx2.Response:
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", trust_env=False) as client:
                return await client.request(method, url, headers=sent, **more)

        return self.loop.run(ask_once())

    def close(self) -> None:
        self.loop.close()
        self.core.close()
