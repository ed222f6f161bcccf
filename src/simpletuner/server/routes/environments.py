"""Making, moving and exporting environments, and their dataset files: /api/configs (api.md §2.3)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

import simpletuner
from simpletuner.config.environments import Environments
from simpletuner.config.lycoris import FILE, generated_text
from simpletuner.config.model_options import AdapterOptions
from simpletuner.errors import UserError
from simpletuner.events import utc_now
from simpletuner.families.registry import load_spec
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.environment_view import Meta, starter_datasets
from simpletuner.server.errors import ErrorItem, did_you_mean, error_responses
from simpletuner.server.hooks import require_hooks
from simpletuner.server.idempotency import IdempotencyKey, build_claim, once
from simpletuner.server.identity import Identity
from simpletuner.server.owners import find_changeable
from simpletuner.server.plain_json import PlainObject, PlainObjects
from simpletuner.server.rights import needs
from simpletuner.server.routes.configs import (
    EDIT_ERRORS,
    EXAMPLES,
    UNKNOWN,
    Edited,
    IfMatch,
    checked,
    edited,
    read_masked,
    show,
)
from simpletuner.server.routes.training import show_problems

router = APIRouter(prefix="/api/configs", tags=["configurations"])


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewEnvironment(_Body):
    name: str = Field(max_length=80, examples=["pixart-demo"])
    model_family: str = Field(examples=["pixart_sigma"])
    model_flavour: str | None = None
    model_type: Literal["lora", "full"] = "lora"
    lora_type: Literal["standard", "lycoris"] | None = None
    description: str | None = None
    tags: list[str] | None = None
    example: str | None = None
    dataloader_path: str | None = None
    create_dataloader: bool = True


class DataloaderPlace(BaseModel):
    path: str
    absolute_path: str


class MadeEnvironment(BaseModel):
    message: str
    environment: Meta
    config: dict[str, Any]
    dataloader: DataloaderPlace | None


class NewName(_Body):
    new_name: str = Field(max_length=80)


class TargetName(_Body):
    target_name: str = Field(max_length=80)


class Moved(BaseModel):
    message: str
    metadata: Meta


class DataloaderView(BaseModel):
    content: Any
    path: str
    warnings: list[ErrorItem]


class PutDataloader(_Body):
    config: PlainObjects


class NewDataloader(_Body):
    path: str | None = None
    include_defaults: bool = True
    overwrite: bool = False


class MadeDataloader(BaseModel):
    message: str
    environment: str
    dataloader: DataloaderPlace
    backup: str | None


class ImportRequest(_Body):
    data: PlainObject
    name: str | None = None
    overwrite: bool = False


@router.post(
    "/environments",
    operation_id="create_environment",
    dependencies=[needs("config.create"), audits("config.create")],
    status_code=201,
    response_model=MadeEnvironment,
    responses=error_responses("not_found", "already_exists", "reserved_name", "in_flight", "idempotency_mismatch"),
)
def create_environment(
    core: CoreDep,
    identity: IdentityDep,
    note: AuditDep,
    response: Response,
    body: NewEnvironment,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """A folder with the given identity and a starter dataset file."""
    note.target = body.name
    claim = build_claim(identity.user_id, idempotency_key, ["create_environment", body.model_dump()])
    return once(core, claim, response, note, lambda: _create(core, identity, body))


def _create(core: Core, identity: Identity, body: NewEnvironment) -> MadeEnvironment:
    name = core.environments.check_new_name(body.name)
    config = _example(body.example) | _identity(name, body)
    datasets: list[Any] | None = None
    place = None
    if body.create_dataloader and body.dataloader_path is None:
        datasets = _starter(core, name, config)
        config["--data_backend_config"] = f"{name}/multidatabackend.json"
        place = _place(core, name)
    elif body.dataloader_path is not None:
        config["--data_backend_config"] = body.dataloader_path
    notes: dict[str, Any] = {"description": body.description, "tags": body.tags or [], "owner": identity.user_id}
    lycoris = generated_text(AdapterOptions()) if config.get("--lora_type") == "lycoris" else None
    core.environments.create(name, checked(identity, config), notes, datasets, lycoris)
    core.announce_config(name, "created")
    return MadeEnvironment(
        message=f"Environment {name} created", environment=show(core, name), config=config, dataloader=place
    )


def _identity(name: str, body: NewEnvironment) -> dict[str, Any]:
    spec = load_spec(body.model_family)
    if body.model_flavour is not None and body.model_flavour not in spec.flavours:
        hint = did_you_mean(body.model_flavour, spec.flavours) or f"Known: {', '.join(spec.flavours)}."
        message = f"{spec.title} has no flavour {body.model_flavour!r}."
        raise UserError("invalid_field", message, hint=hint, pointer="/model_flavour")
    lora_type = body.lora_type or "standard" if body.model_type == "lora" else None
    given = {
        "--model_family": body.model_family,
        "--model_flavour": body.model_flavour,
        "--model_type": body.model_type,
        "--lora_type": lora_type,
        "--lycoris_config": f"{name}/{FILE}" if lora_type == "lycoris" else None,
        "--output_dir": f"output/{name}",
    }
    return {option: value for option, value in given.items() if value is not None}


def _example(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    examples = Environments(EXAMPLES)
    if name not in examples.names():
        raise UserError("not_found", f"There is no example {name}.", hint=did_you_mean(name, examples.names()))
    return examples.read(name).config


def _starter(core: Core, name: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    data_root = core.settings.datasets_dir
    if data_root.is_relative_to(core.settings.workspace):
        data_root = data_root.relative_to(core.settings.workspace)
    family, flavour = str(config["--model_family"]), config.get("--model_flavour")
    return starter_datasets(name, family=family, flavour=flavour, data_root=data_root)


def _place(core: Core, name: str) -> DataloaderPlace:
    path = core.settings.config_dir / name / "multidatabackend.json"
    return DataloaderPlace(path=f"{name}/multidatabackend.json", absolute_path=str(path))


@router.post(
    "/{name}/rename",
    operation_id="rename_config",
    dependencies=[needs("config.edit.*"), audits("config.rename")],
    responses=error_responses("unknown_config", "already_exists"),
)
def rename_config(core: CoreDep, identity: IdentityDep, note: AuditDep, name: str, body: NewName) -> Moved:
    """Paths inside that begin with the old name follow, and so does the active name."""
    name = find_changeable(core, identity, name)
    was_active = core.active_environment() == name
    renamed = core.environments.rename(name, body.new_name).name
    if was_active:
        core.activate(renamed)
    note.detail = {"new_name": renamed}
    core.announce_config(renamed, f"renamed from {name}")
    return Moved(message=f"{name} is now {renamed}", metadata=show(core, renamed))


@router.post(
    "/{name}/copy",
    operation_id="copy_config",
    dependencies=[needs("config.create"), audits("config.copy")],
    status_code=201,
    responses=error_responses("unknown_config", "already_exists"),
)
def copy_config(core: CoreDep, identity: IdentityDep, note: AuditDep, name: str, body: TargetName) -> Moved:
    require_hooks(identity, core.environments.read(name).config)
    source = core.environments.folder(name).name
    copied = core.environments.copy(source, body.target_name, owner=identity.user_id).name
    note.detail = {"new_name": copied}
    core.announce_config(copied, "created")
    return Moved(message=f"{name} copied to {copied}", metadata=show(core, copied))


@router.get(
    "/{name}/dataloader",
    operation_id="get_dataloader",
    dependencies=[needs("config.view")],
    responses=error_responses("unknown_config", "not_found"),
)
def get_dataloader(core: CoreDep, name: str, response: Response) -> DataloaderView:
    """The dataset file, with warnings about its text."""
    name = core.environments.folder(name).name
    content, problems, etag = core.environments.read_dataloader(name)
    response.headers["ETag"] = etag
    return DataloaderView(content=content, path=_place(core, name).path, warnings=show_problems(problems))


@router.put(
    "/{name}/dataloader",
    operation_id="put_dataloader",
    dependencies=[needs("config.edit.*"), audits("config.edit")],
    responses=EDIT_ERRORS,
)
def put_dataloader(
    core: CoreDep,
    identity: IdentityDep,
    name: str,
    body: PutDataloader | PlainObjects,
    response: Response,
    if_match: IfMatch = None,
) -> DataloaderView:
    """The list itself, or `{config: list}`."""
    name = find_changeable(core, identity, name)
    datasets = body.config if isinstance(body, PutDataloader) else body
    etag, _ = core.environments.write_dataloader(name, list(datasets), if_match=if_match, author=identity.name)
    core.announce_config(name, "changed")
    response.headers["ETag"] = etag
    return DataloaderView(content=datasets, path=_place(core, name).path, warnings=[])


@router.post(
    "/{name}/dataloader",
    operation_id="create_dataloader",
    dependencies=[needs("config.edit.*"), audits("config.edit")],
    status_code=201,
    responses=error_responses("unknown_config", "already_exists"),
)
def create_dataloader(
    core: CoreDep,
    identity: IdentityDep,
    name: str,
    body: NewDataloader | None = None,
    overwrite: Annotated[bool, Query()] = False,
) -> MadeDataloader:
    """A starter file; the old one is kept as a backup."""
    asked = body or NewDataloader()
    name = find_changeable(core, identity, name)
    if asked.path not in {None, f"{name}/multidatabackend.json", "multidatabackend.json"}:
        raise UserError("bad_path", "An environment's dataset file is its multidatabackend.json.", pointer="/path")
    exists = core.environments.dataloader_path(name).exists()
    if exists and not (overwrite or asked.overwrite):
        hint = "Send overwrite=true; the old file is kept as a backup."
        raise UserError("already_exists", f"{name} has a dataset file.", hint=hint)
    config = core.environments.read(name).config
    if not isinstance(config.get("--model_family"), str):
        raise UserError("invalid_config", f"{name} names no model_family.", hint="Set it first.")
    datasets = _starter(core, name, config) if asked.include_defaults else []
    _, backup = core.environments.write_dataloader(name, datasets, author=identity.name)
    core.announce_config(name, "changed")
    return MadeDataloader(
        message=f"Dataset file of {name} written",
        environment=name,
        dataloader=_place(core, name),
        backup=None if backup is None else str(backup),
    )


@router.get("/{name}/export", operation_id="export_config", dependencies=[needs("config.view")], responses=UNKNOWN)
def export_config(core: CoreDep, name: str, include_metadata: bool = True) -> dict[str, Any]:
    """Everything of the environment without its secrets, or the bare configuration."""
    name = core.environments.folder(name).name
    config, _ = read_masked(core, name)
    if not include_metadata:
        return config
    notes = {"name": name, "exported_at": utc_now(), "version": simpletuner.__version__}
    exported: dict[str, Any] = {"_metadata": core.environments.read_metadata(name) | notes, "config": config}
    if core.environments.dataloader_path(name).exists():
        exported["dataloader"] = core.environments.read_dataloader(name)[0]
    if core.environments.lycoris_path(name).exists():
        exported["lycoris"] = core.environments.read_lycoris(name)[0]
    return exported


@router.post(
    "/import",
    operation_id="import_config",
    dependencies=[needs("config.create"), audits("config.import")],
    status_code=201,
    responses=error_responses("already_exists"),
)
def import_config(
    core: CoreDep, identity: IdentityDep, note: AuditDep, body: ImportRequest, response: Response
) -> Edited:
    """An export, or a bare configuration with `name`."""
    is_export = isinstance(body.data.get("config"), dict)
    config = checked(identity, body.data["config"] if is_export else body.data)
    notes: dict[str, Any] = dict(body.data.get("_metadata") or {}) if is_export else {}
    name = body.name or notes.get("name")
    if not isinstance(name, str):
        raise UserError("invalid_field", "The import has no name.", hint="Send name.", pointer="/name")
    written = body.data.get("dataloader") if is_export else None
    if not isinstance(written, list | None):
        raise UserError("invalid_field", "dataloader is not a list.", pointer="/data/dataloader")
    datasets = cast(list[Any] | None, written)
    lycoris = body.data.get("lycoris") if is_export else None
    if not isinstance(lycoris, dict | None):
        raise UserError("invalid_field", "lycoris is not an object.", pointer="/data/lycoris")
    kept = {key: notes[key] for key in ("description", "tags") if key in notes}
    if body.overwrite and name in core.environments.names():
        name = find_changeable(core, identity, name)
        core.environments.write(name, config, author=identity.name)
        core.environments.write_metadata(name, kept)
        if datasets is not None:
            core.environments.write_dataloader(name, datasets, author=identity.name)
    else:
        kept["owner"] = identity.user_id
        core.environments.create(core.environments.check_new_name(name), config, kept, datasets)
    note.target = name
    if lycoris is not None:
        core.environments.write_lycoris(name, cast(dict[str, Any], lycoris), author=identity.name)
    return edited(core, name, "imported", response)
