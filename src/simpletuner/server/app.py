"""Builds the application: everything is made here and passed on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

import simpletuner
from simpletuner.server.boundary import BodyLimit, Boundary
from simpletuner.server.core import Core
from simpletuner.server.docs import add_docs
from simpletuner.server.errors import add_error_handlers, error_responses
from simpletuner.server.query import refuse_unknown_query
from simpletuner.server.rights import check_right
from simpletuner.server.routes import (
    admin_workers,
    audit,
    auth,
    configs,
    datasets,
    environments,
    events,
    health,
    history,
    jobs,
    keys,
    ledger,
    login,
    logs,
    lycoris,
    metrics,
    queue,
    registration,
    storage,
    system,
    training,
    training_control,
    upload_sessions,
    uploads,
    users,
    webhook_files,
    webhooks,
    worker_jobs,
    workers,
)
from simpletuner.server.security import Security
from simpletuner.server.settings import ServerSettings

EVERYWHERE = error_responses(
    "invalid_credentials", "permission_denied", "origin_not_allowed", "invalid_field", "unknown_field", "rate_limited"
)


def create_app(
    settings: ServerSettings,
    *,
    core: Core | None = None,
    request_shutdown: Callable[[], None] = lambda: None,
) -> FastAPI:
    """Without `core` one is built when the application starts, and closed at its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        built = core or await asyncio.to_thread(Core.build, settings, os.environ)
        app.state.core = built
        supervising = asyncio.create_task(built.supervisor.run())
        for courier in built.couriers:
            courier.start()
        try:
            yield
        finally:
            built.end_waits()
            built.supervisor.close()
            await supervising
            for courier in built.couriers:
                await asyncio.to_thread(courier.close)
            if core is None:
                built.close()

    app = FastAPI(
        title="SimpleTuner",
        version=simpletuner.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(check_right), Depends(refuse_unknown_query)],
        responses=EVERYWHERE,
        separate_input_output_schemas=False,
    )
    app.state.request_shutdown = request_shutdown
    add_error_handlers(app)
    _add_routes(app)
    add_docs(app)
    # The last one added is the outermost.
    app.add_middleware(Security, settings=settings)
    app.add_middleware(BodyLimit)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            allow_credentials=True,
        )
    app.add_middleware(Boundary)
    return app


def _add_routes(app: FastAPI) -> None:
    app.include_router(health.router)
    app.include_router(events.router)
    app.include_router(system.router)
    app.include_router(metrics.router)
    app.include_router(queue.router)
    app.include_router(training.router)
    app.include_router(training_control.router)
    app.include_router(uploads.router)
    app.include_router(upload_sessions.router)
    app.include_router(datasets.router)
    app.include_router(webhooks.router)
    # Before `/{name}`: these are words that no environment can be called.
    app.include_router(webhook_files.router)
    app.include_router(environments.router)
    app.include_router(ledger.router)
    app.include_router(lycoris.router)
    app.include_router(history.router)
    app.include_router(users.router)
    app.include_router(audit.router)
    app.include_router(registration.router)
    app.include_router(admin_workers.router)
    app.include_router(workers.router)
    app.include_router(worker_jobs.router)
    app.include_router(storage.router)
    for router in (auth.router, keys.router):
        app.include_router(router, prefix="/api/cloud/auth")
        app.include_router(router, prefix="/api/auth", include_in_schema=False)
    app.include_router(login.router)
    app.include_router(configs.router)
    for router in (jobs.router, logs.router):
        app.include_router(router, prefix="/api/jobs")
        app.include_router(router, prefix="/api/cloud/jobs", include_in_schema=False)
