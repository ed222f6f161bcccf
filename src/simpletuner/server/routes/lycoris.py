"""The LyCORIS configuration of an environment: /api/configs/{name}/lycoris (api.md §2.3)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict

from simpletuner.config.lycoris import FILE, check_lycoris_config
from simpletuner.errors import UserError
from simpletuner.server.audit_trail import audits
from simpletuner.server.core import CoreDep, IdentityDep
from simpletuner.server.errors import ErrorItem, error_responses
from simpletuner.server.owners import find_changeable
from simpletuner.server.plain_json import PlainObject
from simpletuner.server.rights import needs
from simpletuner.server.routes.configs import EDIT_ERRORS, IfMatch
from simpletuner.server.routes.training import show_problems

router = APIRouter(prefix="/api/configs", tags=["configurations"])


class LycorisView(BaseModel):
    content: Any
    path: str
    warnings: list[ErrorItem]


class PutLycoris(BaseModel):
    model_config = ConfigDict(extra="forbid")

    config: PlainObject


@router.get(
    "/{name}/lycoris",
    operation_id="get_lycoris",
    dependencies=[needs("config.view")],
    responses=error_responses("unknown_config", "not_found"),
)
def get_lycoris(core: CoreDep, name: str, response: Response) -> LycorisView:
    """As it is on disk, with warnings about its text."""
    name = core.environments.folder(name).name
    content, problems, etag = core.environments.read_lycoris(name)
    response.headers["ETag"] = etag
    return LycorisView(content=content, path=f"{name}/{FILE}", warnings=show_problems(problems))


@router.put(
    "/{name}/lycoris",
    operation_id="put_lycoris",
    dependencies=[needs("config.edit.*"), audits("config.edit")],
    responses=EDIT_ERRORS,
)
def put_lycoris(
    core: CoreDep,
    identity: IdentityDep,
    name: str,
    body: PutLycoris,
    response: Response,
    if_match: IfMatch = None,
) -> LycorisView:
    """The environment uses it where `--lycoris_config` names it, as that of `lora_type: lycoris` does."""
    name = find_changeable(core, identity, name)
    if problems := check_lycoris_config(body.config):
        raise UserError("invalid_config", problems[0].message, hint=problems[0].hint, problems=problems)
    etag, _ = core.environments.write_lycoris(name, body.config, if_match=if_match, author=identity.name)
    core.announce_config(name, "changed")
    response.headers["ETag"] = etag
    return LycorisView(content=body.config, path=f"{name}/{FILE}", warnings=[])
