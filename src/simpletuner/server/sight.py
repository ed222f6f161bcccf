"""Which jobs an identity may see and act on; what it may not see is not there for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from simpletuner.errors import UserError
from simpletuner.events import EventType
from simpletuner.server.core import Core
from simpletuner.server.identity import Identity
from simpletuner.server.rights import denied
from simpletuner.store.event_filter import EventFilter
from simpletuner.store.job_row import JobRow

VIEW = "job.view"
CANCEL = "job.cancel"
DELETE = "job.delete"
SERVER_EVENTS: Mapping[EventType, str] = {
    EventType.CONFIG_UPDATED: "config.view",
    EventType.QUEUE_UPDATED: "queue.view",
    EventType.WORKER_STATUS: "admin.workers",
}
"""The permission to see those of no job."""


def find_job(core: Core, identity: Identity, job_id: str, verb: str = VIEW) -> JobRow:
    """Raises UserError `unknown_job`, also of one that is hidden; `permission_denied` of one that can only be seen."""
    job = core.job(job_id)
    if identity.may_to(verb, job.user_id):
        return job
    if identity.may_to(VIEW, job.user_id):
        raise denied(f"{verb}.all")
    raise UserError("unknown_job", f"There is no job {job_id}.")


def seen(identity: Identity, jobs: Iterable[JobRow], verb: str = VIEW) -> list[JobRow]:
    return [job for job in jobs if identity.may_to(verb, job.user_id)]


def latest_ended(core: Core, identity: Identity) -> JobRow | None:
    return core.store.jobs.latest_ended(user_id=owner_filter(identity))


def owner_filter(identity: Identity) -> str | None:
    """The only user whose jobs are seen; None for all."""
    return None if f"{VIEW}.all" in identity.permissions else identity.user_id


def within_sight(core: Core, identity: Identity, wanted: EventFilter) -> EventFilter:
    """Without a job, events of those that are seen, and the server's own by permission."""
    if wanted.job_id is not None:
        return wanted
    owner = owner_filter(identity)
    allowed = frozenset(type_ for type_, permission in SERVER_EVENTS.items() if identity.may(permission))
    server_types = None if owner is None and len(allowed) == len(SERVER_EVENTS) else allowed
    if owner is None:
        return EventFilter(types=wanted.types, server_types=server_types)
    return EventFilter(types=wanted.types, server_types=server_types, sees=lambda: core.store.jobs.ids(user_id=owner))
