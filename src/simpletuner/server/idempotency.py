"""`Idempotency-Key`: the same request twice is one effect and one answer (api.md §1.4)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import Header, Response
from pydantic import BaseModel

from simpletuner.errors import UserError
from simpletuner.events import as_text
from simpletuner.server.audit_trail import AuditNote
from simpletuner.server.core import Core
from simpletuner.store.job_row import Claim

KEPT = timedelta(hours=24)
REPLAYED_HEADER = "Idempotent-Replayed"

IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=128)]


def build_claim(user_id: str, key: str | None, request: Any) -> Claim | None:
    """`request` is what makes two requests the same, JSON-able."""
    if key is None:
        return None
    text = json.dumps(request, sort_keys=True, default=str)
    return Claim(user_id=user_id, key=key, fingerprint=hashlib.sha256(text.encode()).hexdigest())


def find_answer(core: Core, claim: Claim | None) -> dict[str, Any] | None:
    """The stored answer of an earlier request. Raises UserError `idempotency_mismatch` or `in_flight`."""
    if claim is None:
        return None
    before = as_text(datetime.now(UTC) - KEPT)
    core.store.claims.forget(before=before)
    claimed = core.store.claims.find(claim)
    if claimed is None:
        return None
    if claimed.fingerprint != claim.fingerprint:
        message = "This Idempotency-Key was used for another request."
        raise UserError("idempotency_mismatch", message, hint="Take a new key for each request.")
    if claimed.answer is None:
        if not claimed.job_id and claimed.created_at < core.served_since:
            # A server that was killed in between cannot say; what was done by then is seen by doing it again.
            core.store.claims.release(claim)
            return None
        raise _in_flight(f"It made job {claimed.job_id}." if claimed.job_id else "Ask again in a moment.")
    return claimed.answer


def once(
    core: Core, claim: Claim | None, response: Response, note: AuditNote, effect: Callable[[], BaseModel]
) -> dict[str, Any]:
    """The answer of `effect`, which happens once for all requests with this key, unless it fails.

    Raises as `find_answer`, and what `effect` raises.
    """
    if claim is None:
        return effect().model_dump(mode="json")
    stored = find_answer(core, claim)
    if stored is not None:
        note.nothing_done = True
        response.headers[REPLAYED_HEADER] = "true"
        return stored
    if not core.store.claims.take(claim):
        raise _in_flight("Ask again in a moment.")
    with ExitStack() as undo:
        undo.callback(core.store.claims.release, claim)
        answer = effect().model_dump(mode="json")
        undo.pop_all()
    core.store.claims.store_answer(claim, answer)
    return answer


def _in_flight(hint: str) -> UserError:
    return UserError("in_flight", "A request with this Idempotency-Key is being served.", hint=hint)
