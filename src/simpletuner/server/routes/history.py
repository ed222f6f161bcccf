"""Earlier versions of an environment's files: /api/configs/{name}/history and /restore (api.md §2.3)."""

from __future__ import annotations

import json
from difflib import unified_diff
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi import Path as PathParameter
from pydantic import BaseModel, ConfigDict, Field

from simpletuner.config.history import Version, find_version, versions_of
from simpletuner.errors import UserError
from simpletuner.server.audit_trail import audits
from simpletuner.server.config_view import mask, secret_names
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.owners import find_changeable
from simpletuner.server.rights import needs
from simpletuner.server.routes.configs import Edited, IfMatch, checked, edited

router = APIRouter(prefix="/api/configs", tags=["configurations"])

File = Literal["model", "dataloader", "lycoris"]
Etag = Annotated[str, PathParameter(max_length=70, description="With or without its quotes.")]
_NO_VERSION = error_responses("unknown_config", "not_found")


class VersionView(BaseModel):
    """`diff`: from the version before it, in unified format; secrets are masked."""

    etag: str
    modified_at: str
    author: str | None
    is_current: bool
    diff: str


class History(BaseModel):
    versions: list[VersionView]
    total: int


class OneVersion(BaseModel):
    """`diff`: from this version to the file as it is."""

    etag: str
    modified_at: str
    author: str | None
    is_current: bool
    content: Any
    diff: str


class Restore(BaseModel):
    model_config = ConfigDict(extra="forbid")

    etag: str = Field(max_length=70)
    config_type: File = "model"


@router.get("/{name}/history", operation_id="get_history", dependencies=[needs("config.view")], responses=_NO_VERSION)
def get_history(core: CoreDep, name: str, config_type: File = "model") -> History:
    """Newest first. Each file keeps its last ten."""
    versions = versions_of(_file(core, name, config_type))
    before = [*versions[1:], None]
    shown = [
        VersionView(
            etag=version.etag,
            modified_at=version.modified_at,
            author=version.author,
            is_current=version.is_current,
            diff=_diff(earlier, version),
        )
        for version, earlier in zip(versions, before, strict=True)
    ]
    return History(versions=shown, total=len(shown))


@router.get(
    "/{name}/history/{etag}", operation_id="get_version", dependencies=[needs("config.view")], responses=_NO_VERSION
)
def get_version(core: CoreDep, name: str, etag: Etag, config_type: File = "model") -> OneVersion:
    file = _file(core, name, config_type)
    version = find_version(file, etag)
    return OneVersion(
        etag=version.etag,
        modified_at=version.modified_at,
        author=version.author,
        is_current=version.is_current,
        content=_value(version),
        diff=_diff(version, versions_of(file)[0]),
    )


@router.post(
    "/{name}/restore",
    operation_id="restore_config",
    dependencies=[needs("config.edit.*"), audits("config.restore")],
    responses=error_responses("unknown_config", "not_found", "etag_mismatch", "invalid_config"),
)
def restore_config(
    core: CoreDep, identity: IdentityDep, name: str, body: Restore, response: Response, if_match: IfMatch = None
) -> Edited:
    """Write an earlier version again; what it replaces is kept as the newest of the history."""
    name = find_changeable(core, identity, name)
    version = find_version(_file(core, name, body.config_type), body.etag)
    try:
        value = json.loads(version.content)
    except ValueError as error:
        raise UserError("invalid_config", f"That version is not JSON: {error}.") from error
    environments, author = core.environments, identity.name
    match body.config_type:
        case "model":
            environments.write(name, checked(identity, value), if_match=if_match, author=author)
        case "dataloader":
            environments.write_dataloader(name, value, if_match=if_match, author=author)
        case "lycoris":
            environments.write_lycoris(name, value, if_match=if_match, author=author)
    return edited(core, name, "restored", response)


def _file(core: Core, name: str, config_type: File) -> Path:
    folder = core.environments.folder(name)
    files = {"dataloader": core.environments.dataloader_path, "lycoris": core.environments.lycoris_path}
    file = files[config_type](folder.name) if config_type in files else folder / "config.json"
    if not file.exists():
        raise UserError("not_found", f"The environment {folder.name!r} has no {file.name}.")
    return file


def _value(version: Version) -> Any:
    """Without secrets; as text where it is no JSON."""
    try:
        value = json.loads(version.content)
    except ValueError:
        return version.content.decode(errors="replace")
    return mask(value, secret_names(value.get("--model_family"))) if isinstance(value, dict) else value


def _diff(old: Version | None, new: Version) -> str:
    return "\n".join(unified_diff(_lines(old), _lines(new), "before", "after", lineterm=""))


def _lines(version: Version | None) -> list[str]:
    return [] if version is None else json.dumps(_value(version), indent=2, ensure_ascii=False).splitlines()
