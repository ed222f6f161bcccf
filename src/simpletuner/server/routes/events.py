"""GET /api/training/events and its stream (api.md §2.5)."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, WebSocket
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from simpletuner.errors import UserError
from simpletuner.jobs.event_view import EventView, Images
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.identity import Identity
from simpletuner.server.rights import needs
from simpletuner.server.sight import find_job, latest_ended, seen, within_sight
from simpletuner.server.streams import serve_socket, sse_answer
from simpletuner.store.event_filter import EventFilter

router = APIRouter(prefix="/api", tags=["training"])

MOST_INDEX = 2**63 - 1
STREAM_PATHS = ("/training/events/stream", "/training/stream", "/events")

Since = Annotated[int | None, Query(ge=0, le=MOST_INDEX, description="First index, inclusive.")]
Types = Annotated[list[str] | None, Query(description="Globs such as `training.*`; comma lists too.")]
JobId = Annotated[str | None, Query(description="A job, or `current`: the active or last one.", max_length=64)]


class EventPage(BaseModel):
    """Each event as api.md §3. Continuing at `next_index` loses and repeats nothing."""

    events: list[dict[str, Any]]
    job_id: str | None
    next_index: int
    has_more: bool
    oldest_index: int
    truncated: bool


def job_filter(core: Core, identity: Identity, job_id: str | None, types: list[str] | None) -> EventFilter:
    """Raises UserError `unknown_job`."""
    if job_id == "current":
        active = seen(identity, core.store.jobs.latest_active())
        current = active[0] if active else latest_ended(core, identity)
        if current is None:
            raise UserError("unknown_job", "There was no job yet.")
        job_id = current.job_id
    elif job_id is not None:
        find_job(core, identity, job_id)
    return within_sight(core, identity, EventFilter.parse(job_id=job_id, types=types or ()))


async def read_page(
    core: Core, wanted: EventFilter, *, since_index: int, limit: int, wait_s: float, images: Images
) -> Response:
    """An `EventPage`, its events as they are stored. Waits up to `wait_s` for the first match."""
    deadline = time.monotonic() + wait_s
    with core.feed.subscribe(wanted) as subscription:
        page = await asyncio.to_thread(core.store.events.page, since_index, wanted, limit=limit)
        while not page.events and not subscription.closed and (left_s := deadline - time.monotonic()) > 0:
            await subscription.wait(left_s)
            subscription.restart()
            page = await asyncio.to_thread(core.store.events.page, since_index, wanted, limit=limit)
    view = EventView(core.settings.jobs_root, images)
    shown, cut_at = await asyncio.to_thread(view.show_page, page.events)
    rest = {
        "job_id": wanted.job_id,
        "next_index": page.next_index if cut_at is None else cut_at,
        "has_more": page.has_more or cut_at is not None,
        "oldest_index": page.oldest_index,
        "truncated": max(since_index, 1) < page.oldest_index,
    }
    return Response(f'{{"events":[{",".join(shown)}],{json.dumps(rest)[1:]}', media_type="application/json")


@router.get(
    "/training/events",
    operation_id="list_events",
    dependencies=[needs("job.view.*")],
    response_model=EventPage,
    responses=error_responses("unknown_job"),
)
async def list_events(
    core: CoreDep,
    identity: IdentityDep,
    since_index: Annotated[int, Query(ge=0, le=MOST_INDEX, description="First index, inclusive.")] = 0,
    job_id: JobId = None,
    types: Types = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait for the first match.")] = 0,
    images: Images = "inline",
) -> Response:
    """Events after a place, once."""
    wanted = await asyncio.to_thread(job_filter, core, identity, job_id, types)
    return await read_page(core, wanted, since_index=since_index, limit=limit, wait_s=wait, images=images)


async def stream_events(
    core: CoreDep,
    identity: IdentityDep,
    since_index: Since = None,
    job_id: JobId = None,
    types: Types = None,
    images: Images = "inline",
    last_event_id: Annotated[str | None, Header(description="The last index that was seen.")] = None,
) -> StreamingResponse:
    """Events as they come, as server-sent events; with `Upgrade: websocket` the same over a WebSocket."""
    if since_index is None and last_event_id is not None and last_event_id.isdecimal():
        since_index = min(int(last_event_id), MOST_INDEX - 1) + 1
    wanted = await asyncio.to_thread(job_filter, core, identity, job_id, types)
    stream = core.accounts.streams.open(identity)
    return sse_answer(core, wanted, since_index, EventView(core.settings.jobs_root, images), stream)


async def socket_events(
    socket: WebSocket,
    core: CoreDep,
    identity: IdentityDep,
    since_index: Since = None,
    job_id: JobId = None,
    types: Types = None,
    images: Images = "inline",
) -> None:
    wanted = await asyncio.to_thread(job_filter, core, identity, job_id, types)
    with core.accounts.streams.open(identity) as stream:
        await serve_socket(socket, core, wanted, since_index, EventView(core.settings.jobs_root, images), stream)


def _add_stream_routes() -> None:
    for number, path in enumerate(STREAM_PATHS):
        router.add_api_route(
            path,
            stream_events,
            dependencies=[needs("job.view.*")],
            methods=["GET"],
            operation_id="stream_events" if number == 0 else None,
            include_in_schema=number == 0,
            response_class=StreamingResponse,
            responses={
                200: {"content": {"text/event-stream": {}}},
                **error_responses("unknown_job", "too_many_streams"),
            },
        )
        router.add_api_websocket_route(path, socket_events, dependencies=[needs("job.view.*")])


_add_stream_routes()
