"""What would become of every file: /api/configs/{name}/ledger (api.md §2.3)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from simpletuner.config.preflight import preflight_request
from simpletuner.config.train_config import TrainConfig
from simpletuner.errors import UserError, errors_of, warnings_of
from simpletuner.server.asking import ask
from simpletuner.server.core import Core, CoreDep
from simpletuner.server.errors import ErrorItem, did_you_mean, error_responses
from simpletuner.server.ledger import LedgerQuery
from simpletuner.server.option_body import OptionBody
from simpletuner.server.rights import needs
from simpletuner.server.routes.training import show_problems

router = APIRouter(prefix="/api/configs", tags=["configurations"])


class Ledger(BaseModel):
    rows: list[dict[str, Any]]
    """A file each: what becomes of it, and why."""
    total: int
    summary: list[dict[str, Any]]
    """A dataset each, over all its files."""
    errors: list[ErrorItem]
    """What would end a run."""
    warnings: list[ErrorItem]


@router.get(
    "/{name}/ledger",
    operation_id="get_ledger",
    dependencies=[needs("config.view")],
    responses=error_responses("unknown_config", "not_found", "invalid_config"),
)
async def get_ledger(
    core: CoreDep,
    name: str,
    response: Response,
    status: Literal["kept", "dropped"] | None = None,
    dataset: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> Ledger:
    """Discovery as training does it, without a GPU. The first scan of many files takes a while, the next is quick."""
    config = await run_in_threadpool(_read_config, core, name)
    request = preflight_request(config)
    known = [entry["id"] for entry in request["datasets"]]
    if dataset is not None and dataset not in known:
        hint = did_you_mean(dataset, known) or f"Known: {', '.join(known)}."
        raise UserError("not_found", f"{name} has no dataset of pictures {dataset}.", hint=hint, pointer="/dataset")
    page = await core.ledgers.scan(request, LedgerQuery(status, dataset, limit, offset))
    response.headers["X-Total-Count"] = str(page.total)
    return Ledger(
        rows=page.rows,
        total=page.total,
        summary=page.summary,
        errors=show_problems(errors_of(page.problems)),
        warnings=show_problems(warnings_of(page.problems)),
    )


def _read_config(core: Core, name: str) -> TrainConfig:
    """Raises UserError `unknown_config`, `invalid_config`."""
    environment = core.environments.folder(name).name
    return ask(core, OptionBody({}), environment, for_start=True).resolution.require()
