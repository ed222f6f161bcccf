"""The streams that are open: how many, whose, and how they end when their credential does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from simpletuner.errors import UserError
from simpletuner.server.identity import Identity

MOST_STREAMS = 1000
MOST_OF_ONE = 20


class OpenStream:
    """Held while it is sent; `ended` once its asker may see no more."""

    def __init__(self, identity: Identity, streams: OpenStreams) -> None:
        self.identity = identity
        self.ended = False
        self._streams = streams
        self._wake: Callable[[], None] | None = None

    def when_ended(self, wake: Callable[[], None]) -> None:
        """`wake` is called from any thread."""
        self._wake = wake
        if self.ended:
            wake()

    def end(self) -> None:
        self.ended = True
        wake = self._wake
        if wake is not None:
            wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._wake = None
        self._streams.close(self)


class OpenStreams:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[OpenStream] = set()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, identity: Identity) -> OpenStream:
        """Raises UserError `too_many_streams`."""
        with self._lock:
            if len(self._open) >= MOST_STREAMS:
                raise UserError(
                    "too_many_streams", f"{MOST_STREAMS} streams are open.", hint="Poll, or try again later."
                )
            own = sum(stream.identity.quota == identity.quota for stream in self._open)
            if identity.by != "loopback" and own >= MOST_OF_ONE:
                raise UserError("too_many_streams", f"You have {own} streams open.", hint="Close one, or poll.")
            stream = OpenStream(identity, self)
            self._open.add(stream)
        return stream

    def close(self, stream: OpenStream) -> None:
        with self._lock:
            self._open.discard(stream)

    def end(self, affected: Callable[[Identity], bool]) -> None:
        """End those of the identities that `affected` tells."""
        with self._lock:
            ending = [stream for stream in self._open if affected(stream.identity)]
        for stream in ending:
            stream.end()
