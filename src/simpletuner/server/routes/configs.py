"""Environments: /api/configs (api.md §2.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field

import simpletuner.examples
from simpletuner.config.environments import Environments, etag_of
from simpletuner.config.export import json_schema
from simpletuner.config.sources import layer_from_mapping
from simpletuner.config.webhook_files import WebhookFiles
from simpletuner.errors import UserError
from simpletuner.server.asking import ask, known_options, typed_values
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.config_view import dashed, mask, secret_names, unmask
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.environment_view import Findings, Meta, find_problems, show_environment, shown_path
from simpletuner.server.errors import error_responses
from simpletuner.server.hooks import hook_warnings, require_hooks
from simpletuner.server.identity import Identity
from simpletuner.server.option_body import OptionBody
from simpletuner.server.owners import DELETE, find_changeable
from simpletuner.server.plain_json import PlainObject
from simpletuner.server.rights import needs
from simpletuner.server.routes.training import ValidateAnswer, show_problems

router = APIRouter(prefix="/api/configs", tags=["configurations"])

EXAMPLES = Path(simpletuner.examples.__file__).parent
ConfigType = Literal["model", "dataloader", "lycoris", "webhook"]
IfMatch = Annotated[str | None, Header(alias="If-Match", max_length=200)]
UNKNOWN = error_responses("unknown_config")
EDIT_ERRORS = error_responses("unknown_config", "etag_mismatch", "invalid_config")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ConfigList(BaseModel):
    configs: list[Meta]
    active: str | None
    count: int
    config_type: ConfigType


class Example(BaseModel):
    name: str
    description: str | None
    defaults: dict[str, Any]
    config_path: str
    dataloader_path: str | None
    has_dataloader: bool


class ExampleList(BaseModel):
    examples: list[Example]
    count: int


class ActiveConfig(BaseModel):
    name: str | None
    config: dict[str, Any] | None
    metadata: Meta | None


class StoredConfigView(BaseModel):
    name: str
    config: Any
    metadata: Meta
    config_type: ConfigType


class PutConfig(_Body):
    config: PlainObject = Field(examples=[{"--learning_rate": 0.0001}])
    description: str | None = None
    tags: list[str] | None = None
    name: str | None = None


class NewConfig(PutConfig):
    name: str | None = Field(default=..., max_length=80)


class Edited(BaseModel):
    message: str
    metadata: Meta
    validation: Findings


class Activated(BaseModel):
    message: str
    active: str | None


class Message(BaseModel):
    message: str


@router.get("", operation_id="list_configs", dependencies=[needs("config.view")])
def list_configs(
    core: CoreDep,
    response: Response,
    config_type: ConfigType = "model",
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> ConfigList:
    """Those that have a file of `config_type`; broken ones with their `error`."""
    file = {"dataloader": "multidatabackend.json", "lycoris": "lycoris_config.json"}.get(config_type)
    root = core.environments.root
    names = [name for name in core.environments.names() if file is None or (root / name / file).exists()]
    if config_type == "webhook":
        names = WebhookFiles(root).names()
    response.headers["X-Total-Count"] = str(len(names))
    show_one = show_webhook_file if config_type == "webhook" else show
    shown = [show_one(core, name) for name in names[offset : offset + limit]]
    return ConfigList(configs=shown, active=core.active_environment(), count=len(names), config_type=config_type)


@router.get("/examples", operation_id="list_examples", dependencies=[needs("config.view")])
def list_examples() -> ExampleList:
    """The environments that come with the package."""
    examples = Environments(EXAMPLES)
    found: list[Example] = []
    for name in examples.names():
        meta = show_environment(examples, name, relative_to=EXAMPLES)
        config = {} if meta.error else examples.read(name).config
        found.append(
            Example(
                name=name,
                description=meta.description,
                defaults=config,
                config_path=f"{meta.path}/config.json",
                dataloader_path=meta.dataloader_path,
                has_dataloader=meta.has_dataloader,
            )
        )
    return ExampleList(examples=found, count=len(found))


@router.get("/active", operation_id="get_active_config", dependencies=[needs("config.view")])
def get_active_config(core: CoreDep) -> ActiveConfig:
    """Never implied: null until one was activated."""
    name = core.active_environment()
    if name is None:
        return ActiveConfig(name=None, config=None, metadata=None)
    return ActiveConfig(name=name, config=read_masked(core, name)[0], metadata=show(core, name))


@router.get("/schema", operation_id="get_config_schema", dependencies=[needs("config.view")])
def get_config_schema() -> dict[str, Any]:
    """JSON schema of all options."""
    return json_schema()


@router.post(
    "",
    operation_id="create_config",
    dependencies=[needs("config.create"), audits("config.create")],
    status_code=201,
    responses=error_responses("already_exists"),
)
def create_config(core: CoreDep, identity: IdentityDep, note: AuditDep, body: NewConfig, response: Response) -> Edited:
    """A new environment with this configuration and nothing else."""
    name = note.target = core.environments.check_new_name(body.name or "")
    config = checked(identity, body.config)
    core.environments.create(name, config, notes_of(body) | {"owner": identity.user_id}, None)
    return edited(core, name, "created", response)


@router.get(
    "/{name}",
    operation_id="get_config",
    dependencies=[needs("config.view")],
    response_model=StoredConfigView,
    responses={304: {"description": "Not modified"}, **error_responses("unknown_config", "not_found")},
)
def get_config(
    core: CoreDep,
    name: str,
    response: Response,
    config_type: Literal["model", "dataloader", "lycoris"] = "model",
    if_none_match: Annotated[str | None, Header(max_length=200)] = None,
) -> StoredConfigView | Response:
    """Only what was set; defaults are not shown."""
    name = core.environments.folder(name).name
    if config_type == "dataloader":
        content, _, etag = core.environments.read_dataloader(name)
    elif config_type == "lycoris":
        content, _, etag = core.environments.read_lycoris(name)
    else:
        content, etag = read_masked(core, name)
    if if_none_match == etag:
        return Response(status_code=304, headers={"ETag": etag})
    response.headers["ETag"] = etag
    return StoredConfigView(name=name, config=content, metadata=show(core, name), config_type=config_type)


@router.put(
    "/{name}",
    operation_id="put_config",
    dependencies=[needs("config.edit.*"), audits("config.edit")],
    responses=EDIT_ERRORS,
)
def put_config(
    core: CoreDep, identity: IdentityDep, name: str, body: PutConfig, response: Response, if_match: IfMatch = None
) -> Edited:
    """Replace the configuration whole. What contradicts itself is stored and reported; unknown options are refused."""
    name = find_changeable(core, identity, name)
    stored = core.environments.read(name).config
    core.environments.write(
        name, checked(identity, unmask(dashed(body.config), stored)), if_match=if_match, author=identity.name
    )
    if notes := notes_of(body):
        core.environments.write_metadata(name, notes)
    return edited(core, name, "updated", response)


@router.patch(
    "/{name}",
    operation_id="patch_config",
    dependencies=[needs("config.edit.*"), audits("config.edit")],
    responses=EDIT_ERRORS,
)
def patch_config(
    core: CoreDep, identity: IdentityDep, name: str, body: PutConfig, response: Response, if_match: IfMatch = None
) -> Edited:
    """A merge patch: null removes an option."""
    name = find_changeable(core, identity, name)
    stored = core.environments.read(name).config
    merged = stored | unmask(dashed(body.config), stored)
    kept = {option: value for option, value in merged.items() if value is not None}
    core.environments.write(name, checked(identity, kept), if_match=if_match, author=identity.name)
    if notes := notes_of(body):
        core.environments.write_metadata(name, notes)
    return edited(core, name, "updated", response)


@router.delete(
    "/{name}",
    operation_id="delete_config",
    dependencies=[needs("config.delete.*"), audits("config.delete")],
    responses=error_responses("unknown_config", "environment_active"),
)
def delete_config(core: CoreDep, identity: IdentityDep, name: str) -> Message:
    """Its folder goes to the trash."""
    name = find_changeable(core, identity, name, DELETE)
    if name == core.active_environment():
        raise UserError("environment_active", f"{name} is active.", hint="Deactivate it or activate another first.")
    core.environments.delete(name)
    core.announce_config(name, "deleted")
    return Message(message=f"{name} deleted")


@router.post(
    "/{name}/activate",
    operation_id="activate_config",
    dependencies=[needs("config.activate"), audits("config.activate")],
    responses=UNKNOWN,
)
def activate_config(core: CoreDep, name: str) -> Activated:
    name = core.environments.folder(name).name
    core.activate(name)
    return Activated(message=f"{name} is active", active=name)


@router.post(
    "/{name}/deactivate",
    operation_id="deactivate_config",
    dependencies=[needs("config.activate"), audits("config.deactivate")],
    responses=UNKNOWN,
)
def deactivate_config(core: CoreDep, name: str) -> Activated:
    """Another active environment stays active."""
    name = core.environments.folder(name).name
    if name == core.active_environment():
        core.activate(None)
    return Activated(message=f"{name} is not active", active=core.active_environment())


@router.post(
    "/{name}/validate", operation_id="validate_environment", dependencies=[needs("config.view")], responses=UNKNOWN
)
def validate_environment(core: CoreDep, identity: IdentityDep, name: str) -> ValidateAnswer:
    """What a start of this environment would say."""
    resolution = ask(core, OptionBody({}), core.environments.folder(name).name, for_start=False).resolution
    return ValidateAnswer(
        valid=not resolution.errors,
        errors=show_problems(resolution.errors),
        warnings=show_problems([*resolution.warnings, *hook_warnings(identity, resolution.values)]),
        resolved_config=mask(resolution.dashed_values(), secret_names(resolution.values.get("model_family"))),
        provenance=resolution.provenance(),
    )


def show(core: Core, name: str) -> Meta:
    return show_environment(core.environments, name, relative_to=core.settings.workspace)


def show_webhook_file(core: Core, name: str) -> Meta:
    file = WebhookFiles(core.environments.root).folder / f"{name}.json"
    place = shown_path(file, relative_to=core.settings.workspace)
    return Meta(name=name, path=place, etag=etag_of(file.read_bytes()))


def read_masked(core: Core, name: str) -> tuple[dict[str, Any], str]:
    """The configuration without secrets, and its ETag."""
    stored = core.environments.read(name)
    return mask(stored.config, secret_names(stored.config.get("--model_family"))), stored.etag


def checked(identity: Identity, config: dict[str, Any]) -> dict[str, Any]:
    """Dashed, as it was written. Raises UserError `invalid_config` or `hook_permission_required`."""
    named = dashed(config)
    require_hooks(identity, named)
    known = known_options(named.get("--model_family"))
    typed_values(layer_from_mapping(config, name="request", known=known), known)
    return {name: value for name, value in named.items() if not name.startswith("__")}


def notes_of(body: PutConfig) -> dict[str, Any]:
    return {key: value for key, value in (("description", body.description), ("tags", body.tags)) if value is not None}


def edited(core: Core, name: str, what: str, response: Response) -> Edited:
    core.announce_config(name, what)
    meta = show(core, name)
    if meta.etag:
        response.headers["ETag"] = meta.etag
    return Edited(message=f"{name} {what}", metadata=meta, validation=find_problems(core, name))
