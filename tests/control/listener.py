"""A stream of the application in this process, read as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from account_world import AccountWorld


class Listener:
    """One stream of the application, read in this process."""

    def __init__(self, world: AccountWorld, path: str, headers: dict[str, str], *, kind: str, peer: str) -> None:
        self.sent: list[dict[str, Any]] = []
        self._came = asyncio.Event()
        self._gone = asyncio.Event()
        self._asked = False
        place, _, query = path.partition("?")
        scope: dict[str, Any] = {
            "type": kind,
            "method": "GET",
            "path": place,
            "raw_path": place.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "client": (peer, 1),
            "headers": [(b"host", b"localhost"), *((key.lower().encode(), headers[key].encode()) for key in headers)],
            "subprotocols": [],
            "extensions": {"websocket.http.response": {}},
        }
        self.task = asyncio.create_task(world.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "websocket.connect"}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self._came.set()

    async def first(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        while True:
            for message in self.sent:
                if wanted(message):
                    return message
            self._came.clear()
            await asyncio.wait_for(self._came.wait(), 5)

    async def status(self) -> int:
        """101 of a socket that was accepted."""
        answer = await self.first(lambda message: "status" in message or message["type"] == "websocket.accept")
        return answer.get("status", 101)

    async def leave(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self.task, 5)
