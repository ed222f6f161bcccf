"""Who did what: /api/audit (api.md §2.2)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel

from simpletuner.server.core import CoreDep
from simpletuner.server.rights import needs
from simpletuner.store.audit import StoredEntry

router = APIRouter(prefix="/api/audit", tags=["users", "configurations"])


class EntryView(BaseModel):
    """`actor` is a user's name; of a failed login, the name that was given."""

    id: int
    at: str
    actor_id: str | None
    actor: str
    action: str
    target: str | None
    detail: dict[str, Any]
    peer: str | None
    request_id: str | None


class EntryList(BaseModel):
    entries: list[EntryView]
    total: int


@router.get("", operation_id="list_audit", dependencies=[needs("audit.view")])
def list_audit(
    core: CoreDep,
    response: Response,
    actor: Annotated[str | None, Query(max_length=254, description="A user's id or name.")] = None,
    action: Annotated[str | None, Query(max_length=48)] = None,
    since: Annotated[str | None, Query(description="At or after this time.", max_length=40)] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> EntryList:
    """Newest first."""
    page = core.store.audit.find(actor=actor, action=action, since=since, limit=limit, offset=offset)
    response.headers["X-Total-Count"] = str(page.total)
    return EntryList(entries=[_show(entry) for entry in page.entries], total=page.total)


def _show(entry: StoredEntry) -> EntryView:
    return EntryView(
        id=entry.number,
        at=entry.at,
        actor_id=entry.actor_id,
        actor=entry.actor,
        action=entry.action,
        target=entry.target,
        detail=dict(entry.detail),
        peer=entry.peer,
        request_id=entry.request_id,
    )
