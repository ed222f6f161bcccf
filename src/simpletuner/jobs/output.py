"""What the trainer prints: kept in `log.txt` as it is, and sent as `log` events in batches."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from simpletuner.events import Event, EventType, Journal, LogData

Stream = Literal["stdout", "stderr"]

BATCH_LINES = 200
BATCH_S = 1.0
TAIL_LINES = 50
MAX_LINE_CHARS = 8000


@dataclass
class _Pending:
    """Of one stream: bytes without their newline yet, and lines not yet sent."""

    rest: bytes = b""
    lines: list[str] = field(default_factory=list[str])
    first_line: int = 1


class OutputPump:
    """The first line after a quiet second leaves at once; a chatty trainer costs one event a second and stream."""

    def __init__(self, log: Path, journal: Journal) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._journal = journal
        self._streams: dict[Stream, _Pending] = {"stdout": _Pending(), "stderr": _Pending()}
        self._last_flush = float("-inf")
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.write_error: OSError | None = None
        self.last_event: Event | None = None
        """Goes into the journal after everything that was printed."""

    def feed(self, stream: Stream, content: bytes) -> None:
        """A full disk must not end the training: the error is kept and told at the end."""
        try:
            os.write(self._log, content)
        except OSError as error:
            self.write_error = error
        pending = self._streams[stream]
        *lines, pending.rest = (pending.rest + content).split(b"\n")
        for line in lines:
            self._take(pending, line)
        if len(pending.rest) > MAX_LINE_CHARS:
            pending.rest = _last_redraw(pending.rest)[-MAX_LINE_CHARS:]
        if len(pending.lines) >= BATCH_LINES:
            self._flush_stream(stream, pending)

    def flush_due(self, now: float) -> None:
        if now - self._last_flush >= BATCH_S and any(pending.lines for pending in self._streams.values()):
            self._last_flush = now
            self._flush()

    def finish(self) -> None:
        """Send what is left, the unended last lines too."""
        for pending in self._streams.values():
            if pending.rest:
                self._take(pending, pending.rest)
                pending.rest = b""
        self._flush()
        if self.last_event is not None:
            self._append(self.last_event)
        os.close(self._log)

    def _take(self, pending: _Pending, line: bytes) -> None:
        text = _last_redraw(line).decode(errors="replace")[:MAX_LINE_CHARS]
        pending.lines.append(text)
        self.tail.append(text)

    def _flush(self) -> None:
        for stream, pending in self._streams.items():
            self._flush_stream(stream, pending)

    def _flush_stream(self, stream: Stream, pending: _Pending) -> None:
        while pending.lines:
            lines = pending.lines[:BATCH_LINES]
            data = LogData(stream=stream, first_line=pending.first_line, lines=lines)
            self._append(Event(type=EventType.LOG, data=data))
            del pending.lines[: len(lines)]
            pending.first_line += len(lines)

    def _append(self, event: Event) -> None:
        try:
            self._journal.append(event)
        except OSError as error:
            self.write_error = error


def _last_redraw(line: bytes) -> bytes:
    """Progress bars redraw a line with carriage returns; its last state is what a reader would see."""
    return line.rstrip(b"\r").rsplit(b"\r", 1)[-1]
