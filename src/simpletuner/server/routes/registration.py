"""Whether people may make their own accounts: /api/cloud/settings/registration (api.md §2.1)."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.rights import needs
from simpletuner.server.routes.users import check_reach, level_permissions
from simpletuner.store.settings import REGISTRATION

router = APIRouter(prefix="/api/cloud/settings", tags=["auth", "configurations"])


class Registration(BaseModel):
    enabled: bool = False
    default_level: str = "researcher"


class RegistrationChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    enabled: bool | None = None
    default_level: str | None = None


@router.get("/registration", operation_id="get_registration", dependencies=[needs("admin.settings")])
def get_registration(core: CoreDep) -> Registration:
    return Registration.model_validate(core.store.settings.get(REGISTRATION, {}))


@router.put(
    "/registration",
    operation_id="put_registration",
    dependencies=[needs("admin.settings"), audits("settings.registration")],
    responses=error_responses("unknown_level"),
)
def put_registration(core: CoreDep, identity: IdentityDep, body: RegistrationChange, note: AuditDep) -> Registration:
    """What is left out stays. The level of the new must not reach further than the asker."""
    changes = body.model_dump(exclude_none=True)
    changed = Registration.model_validate(get_registration(core).model_dump() | changes)
    check_reach(identity, level_permissions(changed.default_level))
    core.store.settings.set(REGISTRATION, changed.model_dump())
    note.target, note.detail = "registration", changed.model_dump()
    return changed
