"""A TCP proxy between a worker and its server that can be cut: what is on the line is lost, new connections hang."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class FaultyLine:
    """Listens on a port of its own, in a thread of its own."""

    def __init__(self, target_port: int) -> None:
        self.host = "localhost"
        self.prefix: list[str] = []
        self._target = target_port
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._pipes: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.port: int = self._run(self._listen())

    def cut(self) -> None:
        """Nothing goes through any more, in either direction; nobody is told."""
        self._run(self._set(is_open=False))

    def mend(self) -> None:
        self._run(self._set(is_open=True))

    def close(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(timeout=10)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _listen(self) -> int:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return server.sockets[0].getsockname()[1]

    async def _set(self, *, is_open: bool) -> None:
        if is_open:
            # Who waited for an answer that was lost has to ask again.
            for writer in self._pipes:
                writer.close()
            self._open.set()
        else:
            self._open.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipes = {writer}
        with suppress(OSError, asyncio.CancelledError):
            there = await asyncio.open_connection("127.0.0.1", self._target)
            pipes.add(there[1])
            self._pipes |= pipes
            await asyncio.gather(self._pass(reader, there[1]), self._pass(there[0], writer))
        for pipe in pipes:
            pipe.close()
        self._pipes -= pipes

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while content := await reader.read(65536):
                if not self._open.is_set():
                    # Lost: a real network would send it again for a while, and then give up.
                    return
                writer.write(content)
                await writer.drain()
            writer.close()
