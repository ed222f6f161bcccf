"""Live events: first what the store has, then what the feed brings; the same for SSE and WebSocket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from simpletuner.jobs.event_view import EventView
from simpletuner.jobs.feed import Subscription
from simpletuner.server.core import Core
from simpletuner.server.open_streams import OpenStream
from simpletuner.store.event_filter import EventFilter
from simpletuner.store.event_row import StoredEvent

HEARTBEAT_S = 15.0
SSE_RETRY_MS = 3000
REPLAY_PAGE = 500
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
GOING_AWAY = 1001
POLICY_VIOLATION = 1008
TRY_AGAIN_LATER = 1013


@dataclass(frozen=True, slots=True)
class Hello:
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    pass


@dataclass(frozen=True, slots=True)
class Overflow:
    """The reader was too slow; it finds everything from `next_index` on in the store."""

    next_index: int


Item = Hello | Heartbeat | Overflow | StoredEvent


class HeldStream(StreamingResponse):
    """Server-sent events; `stream` is given back however they end, also before the first."""

    def __init__(self, frames: AsyncGenerator[str], stream: OpenStream) -> None:
        super().__init__(frames, media_type="text/event-stream", headers=SSE_HEADERS)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream:
            await super().__call__(scope, receive, send)


async def follow(core: Core, wanted: EventFilter, since_index: int | None, stream: OpenStream) -> AsyncGenerator[Item]:
    """Every event from `since_index` on once and in order, until `stream` is ended; None begins now."""
    loop = asyncio.get_running_loop()
    with core.feed.subscribe(wanted) as subscription:

        def close() -> None:
            loop.call_soon_threadsafe(subscription.close)

        stream.when_ended(close)
        # Subscribed before the store is read: what comes in between is in the queue.
        newest = await asyncio.to_thread(core.store.events.newest_index)
        start = newest + 1 if since_index is None else since_index
        first = await asyncio.to_thread(core.store.events.page, start, wanted, limit=1)
        hello = {"next_index": start, "oldest_index": first.oldest_index, "job_id": wanted.job_id}
        yield Hello(hello)
        cursor = start
        if since_index is not None:
            async for event in _replay(core, wanted, subscription, start):
                yield event
                cursor = event.index + 1
        while not subscription.closed:
            came = await subscription.wait(HEARTBEAT_S)
            if stream.ended:
                return
            if subscription.overflowed:
                yield Overflow(cursor)
                return
            for event in subscription.take():
                if event.index >= cursor:
                    yield event
                    cursor = event.index + 1
            if not came:
                yield Heartbeat()


async def _replay(
    core: Core, wanted: EventFilter, subscription: Subscription, cursor: int
) -> AsyncGenerator[StoredEvent]:
    """From the store until it has no more, also when a long replay lets the queue run over meanwhile."""
    while not subscription.closed:
        if subscription.overflowed:
            subscription.restart()
        page = await asyncio.to_thread(core.store.events.page, cursor, wanted, limit=REPLAY_PAGE)
        for event in page.events:
            yield event
        cursor = page.next_index
        if not page.has_more and not subscription.overflowed:
            return


def sse_answer(
    core: Core, wanted: EventFilter, since_index: int | None, view: EventView, stream: OpenStream
) -> StreamingResponse:
    async def frames() -> AsyncGenerator[str]:
        async for item in follow(core, wanted, since_index, stream):
            yield await asyncio.to_thread(_sse_frame, item, view)

    return HeldStream(frames(), stream)


def _sse_frame(item: Item, view: EventView) -> str:
    match item:
        case Hello(body):
            return f"retry: {SSE_RETRY_MS}\nevent: hello\ndata: {json.dumps(body)}\n\n"
        case Heartbeat():
            return ": hb\n\n"
        case Overflow(next_index):
            return f"event: overflow\ndata: {json.dumps({'next_index': next_index})}\n\n"
        case StoredEvent():
            return f"id: {item.index}\nevent: {item.type}\ndata: {view.show_text(item)}\n\n"


async def serve_socket(
    socket: WebSocket,
    core: Core,
    wanted: EventFilter,
    since_index: int | None,
    view: EventView,
    stream: OpenStream,
) -> None:
    """Sends until the client goes; what it says is ignored. Pings are the protocol's own (`server/run.py`)."""
    await socket.accept()
    sending = asyncio.create_task(_send_all(socket, core, wanted, since_index, view, stream))
    listening = asyncio.create_task(_until_disconnect(socket))
    done, pending = await asyncio.wait({sending, listening}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()


async def _send_all(
    socket: WebSocket,
    core: Core,
    wanted: EventFilter,
    since_index: int | None,
    view: EventView,
    stream: OpenStream,
) -> None:
    try:
        async for item in follow(core, wanted, since_index, stream):
            match item:
                case Hello(body):
                    await socket.send_text(json.dumps({"hello": body}))
                case Overflow(next_index):
                    await socket.send_text(json.dumps({"overflow": {"next_index": next_index}}))
                    await socket.close(TRY_AGAIN_LATER)
                    return
                case StoredEvent():
                    text = await asyncio.to_thread(view.show_text, item)
                    await socket.send_text(f'{{"job_id":{json.dumps(item.job_id)},"event":{text}}}')
                case Heartbeat():
                    pass
        await socket.close(POLICY_VIOLATION if stream.ended else GOING_AWAY)
    except WebSocketDisconnect:
        return


async def _until_disconnect(socket: WebSocket) -> None:
    message = await socket.receive()
    while message["type"] != "websocket.disconnect":
        message = await socket.receive()
