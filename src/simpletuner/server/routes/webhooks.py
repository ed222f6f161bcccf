"""What became of outgoing webhooks: /api/webhooks (api.md §2.6)."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from simpletuner.config.webhook import WebhookEndpoint, parse_webhooks
from simpletuner.errors import UserError
from simpletuner.events import Event, EventType, NoticeData, as_text
from simpletuner.jobs.webhook_post import Poster
from simpletuner.server.audit_trail import audits
from simpletuner.server.core import CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.plain_json import PlainObject
from simpletuner.server.rights import denied, needs
from simpletuner.server.sight import VIEW, find_job
from simpletuner.store.webhooks import DeliveryRow, DeliveryStatus

router = APIRouter(prefix="/api/webhooks", tags=["webhooks"])

MANAGE = "webhook.manage"
EXAMPLE = {"webhook_type": "raw", "callback_url": "https://example.com/simpletuner", "log_level": "info"}


class DeliveryView(BaseModel):
    """`last_status` is the HTTP status of the newest attempt, null where no answer came."""

    id: str
    job_id: str
    event_index: int
    url: str
    status: DeliveryStatus
    attempts: int
    last_status: int | None
    last_error: str | None
    next_at: str | None


class DeliveryList(BaseModel):
    deliveries: list[DeliveryView]
    total: int


class TestAnswer(BaseModel):
    delivered: bool
    status: int | None
    error: str | None


@router.get(
    "/deliveries",
    operation_id="list_webhook_deliveries",
    dependencies=[needs(MANAGE, f"{VIEW}.*")],
    responses=error_responses("unknown_job"),
)
def list_deliveries(
    core: CoreDep,
    identity: IdentityDep,
    response: Response,
    job_id: Annotated[str | None, Query(max_length=64)] = None,
    status: DeliveryStatus | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> DeliveryList:
    """Newest first; without webhook.manage those of one's own jobs."""
    own: set[str] | None = None
    if not identity.may(MANAGE):
        own = core.store.jobs.ids(user_id=identity.user_id)
        if job_id is not None and find_job(core, identity, job_id).job_id not in own:
            raise denied(MANAGE)
    page = core.store.webhooks.find(job_id=job_id, of_jobs=own, status=status, limit=limit, offset=offset)
    response.headers["X-Total-Count"] = str(page.total)
    return DeliveryList(deliveries=[_show(row) for row in page.deliveries], total=page.total)


@router.post(
    "/deliveries/{delivery_id}/redeliver",
    operation_id="redeliver_webhook",
    dependencies=[needs(MANAGE, f"{VIEW}.*"), audits("webhook.redeliver")],
    responses=error_responses("not_found"),
)
def redeliver(core: CoreDep, identity: IdentityDep, delivery_id: str) -> DeliveryView:
    """Queue it again, a dead or a delivered one too; it goes before what waits for its endpoint."""
    found = core.store.webhooks.get(delivery_id)
    job = core.store.jobs.get(found.job_id) if found else None
    may = identity.may(MANAGE) or (job is not None and job.user_id == identity.user_id)
    row = core.store.webhooks.redeliver(delivery_id, now_s=time.time()) if may else None
    if row is None:
        raise UserError("not_found", f"There is no delivery {delivery_id}.")
    return _show(row)


@router.post(
    "/test",
    operation_id="test_webhook",
    dependencies=[needs(MANAGE), audits("webhook.test")],
    responses=error_responses("invalid_config"),
    openapi_extra={"requestBody": {"content": {"application/json": {"example": EXAMPLE}}}},
)
async def try_webhook(core: CoreDep, body: PlainObject) -> TestAnswer:
    """Post one notification to an endpoint, now and once."""
    return await post_test(core.poster, body)


async def post_test(poster: Poster, config: Any) -> TestAnswer:
    """Raises UserError `invalid_config` for what is no endpoint."""
    endpoints, problems = parse_webhooks(config)
    if problems:
        raise UserError.from_problems(problems)
    outcome = await poster.post(endpoints[0], _test_event(endpoints[0]), "test")
    return TestAnswer(delivered=outcome.delivered, status=outcome.status, error=outcome.error)


def _test_event(endpoint: WebhookEndpoint) -> dict[str, Any]:
    message = f"SimpleTuner reaches {endpoint.shown_url}."
    event = Event(type=EventType.NOTIFICATION, title="Test", message=message, data=NoticeData(code="webhook_test"))
    return {"index": 0, "schema": 1, "id": "test", **event.model_dump(mode="json", by_alias=True, exclude_none=True)}


def _show(row: DeliveryRow) -> DeliveryView:
    next_at = as_text(datetime.fromtimestamp(row.next_s, UTC))
    return DeliveryView(
        id=row.id,
        job_id=row.job_id,
        event_index=row.event_index,
        url=row.endpoint.shown_url,
        status=row.status,
        attempts=row.attempts,
        last_status=row.last_status,
        last_error=row.last_error,
        next_at=next_at if row.status == "pending" else None,
    )
