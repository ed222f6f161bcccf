"""`Idempotency-Key`: the same request twice is one effect and one answer (api.md §1.4)."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import Header

from simpletuner.errors import UserError
from simpletuner.events import as_text
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
    core.store.jobs.forget_claims(before=before)
    claimed = core.store.jobs.claimed(claim.user_id, claim.key)
    if claimed is None:
        return None
    if claimed.fingerprint != claim.fingerprint:
        message = "This Idempotency-Key was used for another request."
        raise UserError("idempotency_mismatch", message, hint="Take a new key for each request.")
    if claimed.answer is None:
        hint = f"It made job {claimed.job_id}."
        raise UserError("in_flight", "A request with this Idempotency-Key is being served.", hint=hint)
    return claimed.answer
