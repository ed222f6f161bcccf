"""What was given to workers: the newest assignment of each job, with the epoch that fences all older ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, insert, select, update

from simpletuner.events import utc_now
from simpletuner.store.database import Database
from simpletuner.store.schema import assignments

State = Literal["offered", "taken", "ended"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """`journal_start` and `log_start`: bytes that the server had of either when the lease was taken."""

    job_id: str
    worker_id: str
    epoch: int
    state: State
    offered_at: str
    journal_start: int | None = None
    log_start: int | None = None


class AssignmentStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, job_id: str) -> Assignment | None:
        with self._database.read() as connection:
            row = connection.execute(select(assignments).where(assignments.c.job_id == job_id)).one_or_none()
        return None if row is None else Assignment(**row._mapping)  # pyright: ignore[reportPrivateUsage]

    def live(self, worker_id: str | None = None) -> list[Assignment]:
        """Offered or taken; of one worker, or of all."""
        chosen = select(assignments).where(assignments.c.state != "ended")
        if worker_id is not None:
            chosen = chosen.where(assignments.c.worker_id == worker_id)
        with self._database.read() as connection:
            rows = connection.execute(chosen.order_by(assignments.c.offered_at)).all()
        return [Assignment(**row._mapping) for row in rows]  # pyright: ignore[reportPrivateUsage]

    def take(self, job_id: str, epoch: int, *, journal_start: int, log_start: int) -> bool:
        """A runner has it. False when it is not offered under this epoch any more."""
        with self._database.write() as connection:
            taken = connection.execute(
                update(assignments)
                .where(assignments.c.job_id == job_id, assignments.c.epoch == epoch, assignments.c.state == "offered")
                .values(state="taken", journal_start=journal_start, log_start=log_start)
            )
        return taken.rowcount > 0


def put_assignment(connection: Connection, job_id: str, worker_id: str) -> None:
    """The next epoch of the job begins, in the transaction that leases the worker's devices."""
    epoch = connection.scalar(select(assignments.c.epoch).where(assignments.c.job_id == job_id))
    values = {"worker_id": worker_id, "epoch": (epoch or 0) + 1, "state": "offered", "offered_at": utc_now()}
    values |= {"journal_start": None, "log_start": None}
    if epoch is None:
        connection.execute(insert(assignments).values(job_id=job_id, **values))
    else:
        connection.execute(update(assignments).where(assignments.c.job_id == job_id).values(**values))


def end_assignment(connection: Connection, job_id: str) -> None:
    connection.execute(update(assignments).where(assignments.c.job_id == job_id).values(state="ended"))
