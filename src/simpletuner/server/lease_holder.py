"""Who speaks for a job from a worker: the runner that holds the lease of its newest epoch, and nobody else."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header

from simpletuner.errors import UserError
from simpletuner.job import JobDir
from simpletuner.jobs.storage import Storage
from simpletuner.server.core import Core, CoreDep
from simpletuner.store.assignments import Assignment

TOKEN_HEADER = "X-Upload-Token"


@dataclass(frozen=True, slots=True)
class Holder:
    """Its token is genuine, and its epoch the newest; whether the lease still lives is asked where it matters."""

    assignment: Assignment
    job: JobDir

    @property
    def storage(self) -> Storage:
        return Storage(self.job, self.assignment.epoch)

    def check_epoch(self, epoch: int) -> None:
        """Raises UserError `stale_lease` where the request speaks of another epoch than its token."""
        if epoch != self.assignment.epoch:
            raise stale(self.assignment.job_id, epoch)

    def check_lease(self, core: Core) -> None:
        """Raises UserError `stale_lease`."""
        if not core.leases.is_alive(self.assignment.job_id, self.assignment.epoch):
            raise stale(self.assignment.job_id, self.assignment.epoch)


def stale(job_id: str, epoch: int) -> UserError:
    hint = "Stop the trainer and write nothing more: another runner may have the job."
    return UserError("stale_lease", f"Epoch {epoch} does not hold the lease of job {job_id} (any more).", hint=hint)


def find_holder(core: Core, job_id: str, token: str | None) -> Holder:
    """Raises UserError: 401 for a forged token, 403 for another job's, 409 for an older epoch's."""
    if token is None:
        raise UserError("unauthenticated", f"This request carries no {TOKEN_HEADER}.")
    bearer = core.job_tokens.read(token)
    if bearer is None:
        raise UserError("invalid_credentials", f"The {TOKEN_HEADER} of this request is not valid.")
    if bearer.job_id != job_id:
        raise UserError("permission_denied", f"This token is not one of job {job_id}.")
    assignment = core.store.assignments.get(job_id)
    if assignment is None or core.store.jobs.get(job_id) is None:
        raise UserError("unknown_job", f"There is no job {job_id} on a worker.")
    if assignment.epoch != bearer.epoch or assignment.state == "ended":
        raise stale(job_id, bearer.epoch)
    return Holder(assignment, core.placement.job_dir(job_id))


async def _holder(
    core: CoreDep, job_id: str, x_upload_token: Annotated[str | None, Header(max_length=200)] = None
) -> Holder:
    return await asyncio.to_thread(find_holder, core, job_id, x_upload_token)


HolderDep = Annotated[Holder, Depends(_holder)]
