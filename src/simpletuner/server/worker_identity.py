"""Which worker asks: by the token that it was made with, which opens the routes of agents and nothing else."""

from __future__ import annotations

import asyncio
import secrets
import string
from typing import Annotated

from fastapi import Depends, Header
from starlette.requests import HTTPConnection

from simpletuner.errors import UserError
from simpletuner.server.accounts import hash_secret
from simpletuner.server.core import Core, CoreDep
from simpletuner.server.peer import peer_of
from simpletuner.server.rate_limit import ANONYMOUS
from simpletuner.store.workers import WorkerRow

_ALPHABET = string.ascii_letters + string.digits


def new_worker_token() -> str:
    return "wt_" + "".join(secrets.choice(_ALPHABET) for _ in range(32))


def identify_worker(core: Core, token: str | None, peer: str) -> WorkerRow:
    """Raises UserError `unauthenticated`, `invalid_credentials`, and RateLimited for who guesses."""
    if token is None:
        core.limiter.hit(ANONYMOUS, peer)
        raise UserError("unauthenticated", "This request carries no X-Worker-Token.")
    worker = core.store.workers.of_token(hash_secret(token))
    if worker is None:
        core.limiter.hit(ANONYMOUS, peer)
        raise bad_token()
    return worker


def bad_token() -> UserError:
    hint = "Make another with `simpletuner workers token NAME`."
    return UserError("invalid_credentials", "The X-Worker-Token of this request is not valid.", hint=hint)


WorkerToken = Annotated[str | None, Header(alias="X-Worker-Token", max_length=200)]


async def _worker(core: CoreDep, connection: HTTPConnection, x_worker_token: WorkerToken = None) -> WorkerRow:
    return await asyncio.to_thread(identify_worker, core, x_worker_token, peer_of(connection.scope))


WorkerDep = Annotated[WorkerRow, Depends(_worker)]


def check_self(worker: WorkerRow, worker_id: str) -> None:
    """A worker speaks for itself. Raises UserError `permission_denied`."""
    if worker.worker_id != worker_id:
        raise UserError("permission_denied", f"This token is not one of worker {worker_id}.")
