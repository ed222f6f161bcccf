"""Routes that change something say what they do; the trail of it is written when they have done it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection
from starlette.types import Scope

from simpletuner.server.identity import Identity
from simpletuner.server.peer import peer_of
from simpletuner.store.audit import AuditEntry, AuditStore

STATE = "audit"
MOST_TARGET_CHARS = 256


class AuditNote:
    """What a route adds to its entry: what it acted on, and facts that are no secrets."""

    def __init__(self, action: str) -> None:
        self.action = action
        self.actor: str | None = None
        self.actor_id: str | None = None
        self.target: str | None = None
        self.detail: dict[str, Any] = {}
        self.even_refused = False
        self.nothing_done = False


class Audits:
    """Marks a route; a test reads `action` off every route that changes something."""

    def __init__(self, action: str) -> None:
        self.action = action

    async def __call__(self, connection: HTTPConnection) -> None:
        connection.scope["state"][STATE] = AuditNote(self.action)


def audits(action: str) -> Any:
    """For a route's `dependencies`."""
    return Depends(Audits(action))


async def _note(connection: HTTPConnection) -> AuditNote:
    return connection.scope["state"][STATE]


AuditDep = Annotated[AuditNote, Depends(_note)]


class AuditTrail:
    """Of one request."""

    def __init__(self, store: AuditStore, scope: Scope) -> None:
        self._store = store
        self._scope = scope

    def is_due(self, status: int) -> bool:
        note: AuditNote | None = self._scope["state"].get(STATE)
        return note is not None and not note.nothing_done and (status < 400 or note.even_refused)

    def write(self) -> None:
        """Before the answer leaves: who has it, finds the entry."""
        state = self._scope["state"]
        note: AuditNote = state[STATE]
        identity: Identity | None = state.get("identity")
        parts: dict[str, str] = self._scope.get("path_params") or {}
        target = note.target if note.target is not None else "/".join(str(part) for part in parts.values()) or None
        self._store.record(
            AuditEntry(
                actor_id=note.actor_id or (identity.user_id if identity else None),
                actor=note.actor or (identity.name if identity else "anonymous"),
                action=note.action,
                target=None if target is None else target[:MOST_TARGET_CHARS],
                detail=note.detail,
                peer=peer_of(self._scope),
                request_id=state["request_id"],
            )
        )
