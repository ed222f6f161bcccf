"""Whether the server lives and works. Public."""

from __future__ import annotations

import shutil

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError

from simpletuner.server.core import Core, CoreDep
from simpletuner.server.errors import ErrorBody, error_responses, request_id_of
from simpletuner.server.rights import public

router = APIRouter(tags=["health"])

LEAST_FREE_BYTES = 64 * 2**20


class Health(BaseModel):
    status: str = "healthy"
    mode: str = "unified"


class Readiness(Health):
    checks: dict[str, bool]


@router.get("/health", operation_id="health", dependencies=[public()])
@router.get("/health/live", operation_id="health_live", dependencies=[public()])
async def health() -> Health:
    return Health()


@router.get(
    "/health/ready",
    operation_id="health_ready",
    dependencies=[public()],
    response_model=Readiness,
    responses=error_responses("not_ready"),
)
def health_ready(core: CoreDep, request: Request) -> Response:
    """503 with the same `checks` beside the error when one of them fails."""
    checks = {
        "database": _database_answers(core),
        "disk": shutil.disk_usage(core.settings.state_dir).free > LEAST_FREE_BYTES,
        "supervisor": core.supervisor.is_healthy,
    }
    if all(checks.values()):
        return JSONResponse(Readiness(checks=checks).model_dump())
    failed = ", ".join(name for name, works in checks.items() if not works)
    body = ErrorBody(detail=f"Not ready: {failed}.", code="not_ready", request_id=request_id_of(request.scope))
    return JSONResponse({**body.model_dump(exclude_none=True), "checks": checks}, 503)


def _database_answers(core: Core) -> bool:
    try:
        core.store.jobs.ids()
        core.store.events.ping()
    except SQLAlchemyError:
        return False
    return True
