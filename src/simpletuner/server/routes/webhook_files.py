"""Stored endpoints: /api/configs/webhooks (api.md §2.3)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from simpletuner.config.webhook import mask_webhooks
from simpletuner.config.webhook_files import WebhookFiles
from simpletuner.errors import UserError
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import Core, CoreDep
from simpletuner.server.errors import error_responses
from simpletuner.server.plain_json import check_plain
from simpletuner.server.rights import needs
from simpletuner.server.routes.webhooks import EXAMPLE, TestAnswer, post_test

router = APIRouter(prefix="/api/configs/webhooks", tags=["configurations", "webhooks"])

Endpoints = Annotated[dict[str, Any] | list[dict[str, Any]], AfterValidator(check_plain), Field(examples=[EXAMPLE])]
UNKNOWN = error_responses("unknown_config")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewWebhook(_Body):
    name: str = Field(max_length=80)
    config: Endpoints


class PutWebhook(_Body):
    config: Endpoints


class WebhookView(BaseModel):
    """`config` is null, and `error` says why, where the file cannot be read."""

    name: str
    config: Any
    path: str
    error: str | None = None


class WebhookList(BaseModel):
    webhooks: list[WebhookView]
    total: int


class Deleted(BaseModel):
    message: str


@router.get("", operation_id="list_webhooks", dependencies=[needs("config.edit.*")])
def list_webhooks(
    core: CoreDep,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> WebhookList:
    names = _files(core).names()
    response.headers["X-Total-Count"] = str(len(names))
    return WebhookList(webhooks=[show_webhook(core, name) for name in names[offset : offset + limit]], total=len(names))


@router.post(
    "",
    operation_id="create_webhook",
    dependencies=[needs("config.edit.*"), audits("webhook.create")],
    status_code=201,
    responses=error_responses("already_exists", "invalid_config"),
)
def create_webhook(core: CoreDep, note: AuditDep, body: NewWebhook) -> WebhookView:
    """An endpoint or a list of them, to be named by `--webhook_config webhooks/<name>.json`."""
    name = note.target = _files(core).create(body.name, body.config)
    return show_webhook(core, name)


@router.get("/{name}", operation_id="get_webhook", dependencies=[needs("config.edit.*")], responses=UNKNOWN)
def get_webhook(core: CoreDep, name: str) -> WebhookView:
    """Its secrets are masked."""
    _files(core).read(name)
    return show_webhook(core, name.removesuffix(".json"))


@router.put(
    "/{name}",
    operation_id="put_webhook",
    dependencies=[needs("config.edit.*"), audits("webhook.edit")],
    responses=error_responses("unknown_config", "invalid_config"),
)
def put_webhook(core: CoreDep, name: str, body: PutWebhook) -> WebhookView:
    """A masked secret keeps what is stored."""
    _files(core).replace(name, body.config)
    return show_webhook(core, name.removesuffix(".json"))


@router.delete(
    "/{name}",
    operation_id="delete_webhook",
    dependencies=[needs("config.edit.*"), audits("webhook.delete")],
    responses=UNKNOWN,
)
def delete_webhook(core: CoreDep, name: str) -> Deleted:
    """It goes to the trash."""
    _files(core).delete(name)
    return Deleted(message=f"{name} deleted")


@router.post(
    "/{name}/test",
    operation_id="test_stored_webhook",
    dependencies=[needs("config.edit.*"), audits("webhook.test")],
    responses=UNKNOWN,
)
async def try_stored_webhook(core: CoreDep, name: str) -> TestAnswer:
    """Post a notification to each endpoint; the answer is that of the first failure, or of the last one."""
    config = _files(core).read(name)
    answer = TestAnswer(delivered=False, status=None, error=f"{name} holds no endpoint.")
    for endpoint in config if isinstance(config, list) else [config]:
        answer = await post_test(core.poster, endpoint)
        if not answer.delivered:
            break
    return answer


def show_webhook(core: Core, name: str) -> WebhookView:
    files = _files(core)
    path = str(files.folder / f"{name}.json")
    try:
        return WebhookView(name=name, config=mask_webhooks(files.read(name)), path=path)
    except UserError as error:
        return WebhookView(name=name, config=None, path=path, error=error.message)


def _files(core: Core) -> WebhookFiles:
    return WebhookFiles(core.settings.config_dir)
