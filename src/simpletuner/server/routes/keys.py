"""API keys: /api/cloud/auth/api-keys and /api/auth/api-keys (api.md §2.1)."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.identity import Identity
from simpletuner.server.permission import PERMISSIONS, within
from simpletuner.server.rate_limit import KEYS
from simpletuner.server.rights import AUTH, denied, limited, needs
from simpletuner.store.credentials import KeyRow, no_key

router = APIRouter(prefix="/api-keys", tags=["auth", "configurations"])

Glob = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z.*?]+$")]


class NewKey(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100, examples=["automation-key"])
    expires_days: int | None = Field(default=None, ge=1, le=365)
    scoped_permissions: list[Glob] | None = Field(default=None, min_length=1, max_length=50)


class KeyInfo(BaseModel):
    id: int
    name: str
    prefix: str
    scoped_permissions: list[str] | None
    created_at: str
    expires_at: str | None
    revoked_at: str | None


class MadeKey(BaseModel):
    """`key` is shown this once."""

    key: str
    prefix: str
    key_info: KeyInfo


class Revoked(BaseModel):
    success: bool = True


@router.get("", operation_id="list_api_keys", dependencies=[needs(AUTH)])
def list_api_keys(core: CoreDep, identity: IdentityDep) -> list[KeyInfo]:
    """Of the asker, newest first."""
    if identity.by == "loopback":
        return []
    return [_show(row) for row in core.store.credentials.keys_of(int(identity.user_id))]


@router.post(
    "",
    operation_id="create_api_key",
    status_code=201,
    dependencies=[needs("api.keys.own"), audits("key.create"), limited(KEYS)],
)
def create_api_key(core: CoreDep, identity: IdentityDep, body: NewKey, note: AuditDep) -> MadeKey:
    """It may do what its user may, within its scope; no more than the credential that makes it."""
    _check_scope(identity, body.scoped_permissions)
    user = core.accounts.user(identity)
    key, row = core.accounts.create_key(
        user, name=body.name, scope=body.scoped_permissions, expires_days=body.expires_days
    )
    note.target, note.detail = row.prefix, {"name": row.name, "scope": body.scoped_permissions}
    return MadeKey(key=key, prefix=row.prefix, key_info=_show(row))


@router.delete(
    "/{key_id}",
    operation_id="revoke_api_key",
    dependencies=[needs("api.keys.*"), audits("key.revoke")],
    responses=error_responses("not_found"),
)
def revoke_api_key(core: CoreDep, identity: IdentityDep, key_id: int, note: AuditDep) -> Revoked:
    """At once; also one that is revoked already."""
    row = core.store.credentials.get_key(key_id) if abs(key_id) < 2**63 else None
    if row is None or not identity.may_to("api.keys", str(row.user_id)):
        raise no_key(key_id)
    core.accounts.revoke_key(key_id)
    note.target = row.prefix
    return Revoked()


def _check_scope(identity: Identity, scope: list[str] | None) -> None:
    """Raises UserError `permission_denied` where the new key would reach further than the asker."""
    for glob in scope or ():
        if not within(identity.permissions, [glob]):
            raise denied(glob)
    if identity.scope is not None:
        # Against all there are: what the user is given later is not the new key's either.
        wider = within(PERMISSIONS, scope or ["*"]) - within(PERMISSIONS, identity.scope)
        if wider:
            raise denied(min(wider))


def _show(row: KeyRow) -> KeyInfo:
    return KeyInfo(
        id=row.id,
        name=row.name,
        prefix=row.prefix,
        scoped_permissions=None if row.scope is None else list(row.scope),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
