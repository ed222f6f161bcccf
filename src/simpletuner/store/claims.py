"""Idempotency keys: who used which for what, and the answer that went out."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from simpletuner.events import utc_now
from simpletuner.store.database import Database
from simpletuner.store.job_row import Claim, Claimed
from simpletuner.store.schema import idempotency


class ClaimStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, claim: Claim) -> Claimed | None:
        """Who has the key of this claim."""
        with self._database.read() as connection:
            row = connection.execute(select(idempotency).where(_is_key_of(claim))).one_or_none()
        if row is None:
            return None
        return Claimed(fingerprint=row.fingerprint, job_id=row.job_id, answer=row.answer, created_at=row.created_at)

    def take(self, claim: Claim) -> bool:
        """For an effect that is no row of this database. False where another request has the key."""
        try:
            with self._database.write() as connection:
                put_claim(connection, claim, job_id="", created_at=utc_now())
        except IntegrityError:
            return False
        return True

    def release(self, claim: Claim) -> None:
        """The effect did not come about."""
        with self._database.write() as connection:
            connection.execute(delete(idempotency).where(_is_key_of(claim)))

    def store_answer(self, claim: Claim, answer: dict[str, Any]) -> None:
        with self._database.write() as connection:
            connection.execute(update(idempotency).where(_is_key_of(claim)).values(answer=answer))

    def forget(self, *, before: str) -> None:
        with self._database.write() as connection:
            connection.execute(delete(idempotency).where(idempotency.c.created_at < before))


def put_claim(connection: Connection, claim: Claim, *, job_id: str, created_at: str) -> None:
    """In the transaction of the claim's effect. Raises IntegrityError where the key is taken."""
    connection.execute(insert(idempotency).values(job_id=job_id, created_at=created_at, **asdict(claim)))


def _is_key_of(claim: Claim) -> ColumnElement[bool]:
    return and_(idempotency.c.user_id == claim.user_id, idempotency.c.key == claim.key)
