"""Follows a job at a server until it has ended, across restarts of the server."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from simpletuner.cli.client import Client, place
from simpletuner.cli.follow import EventPrinter
from simpletuner.cli.refusal import ClientExit, Refusal

WAIT_S = 1.0
"""How long the server keeps a question for new events, and Ctrl-C may wait."""
PATIENCE_S = 120.0
"""A server that is restarted is back by then."""
COMMANDS = ("stop", "cancel")
"""What the first and the second signal ask for."""


class Follower:
    """Prints a job's events until it has ended, and passes on what the person asks meanwhile."""

    def __init__(
        self,
        client: Client,
        job_id: str,
        printer: EventPrinter,
        signals: Sequence[int] = (),
        *,
        types: Sequence[str] = (),
    ) -> None:
        """`signals` may grow meanwhile; `types` are globs, all events without one."""
        self._client = client
        self._job_id = job_id
        self._printer = printer
        self._signals = signals
        self._types = list(types)
        self._num_passed_on = 0
        self._next_index = 0
        self._silent_since: float | None = None

    def follow(self) -> dict[str, Any]:
        """The job as it ended. Raises Refusal where the server refuses, or is away for `PATIENCE_S`."""
        while True:
            try:
                job = self._look()
            except Refusal as error:
                self._bear(error)
                continue
            self._silent_since = None
            if job is not None:
                return job

    def _look(self) -> dict[str, Any] | None:
        """Once: the job if it had ended before its last events were read."""
        self._pass_on()
        job = self._client.ask("GET", place("/api/jobs", self._job_id))["job"]
        has_more = self.read_page(wait_s=0 if job["is_terminal"] else WAIT_S)
        return job if job["is_terminal"] and not has_more else None

    def read_page(self, *, wait_s: float = 0) -> bool:
        """Print the next events. Whether there are more by now."""
        query: dict[str, Any] = {
            "job_id": self._job_id,
            "since_index": self._next_index,
            "wait": wait_s,
            "images": "url",
        }
        if self._types:
            query["types"] = self._types
        page = self._client.ask("GET", "/api/training/events", params=query)
        for event in page["events"]:
            self._printer.print(json.dumps(event).encode() + b"\n")
        self._next_index = page["next_index"]
        return page["has_more"]

    def _pass_on(self) -> None:
        while self._num_passed_on < min(len(self._signals), len(COMMANDS)):
            command = COMMANDS[self._num_passed_on]
            try:
                self._client.ask("POST", place("/api/jobs", self._job_id, command))
            except Refusal as error:
                if error.client_exit is ClientExit.UNREACHABLE:
                    raise
                self._printer.say(error.message)
            else:
                again = " Once more to cancel without a checkpoint." if command == "stop" else ""
                self._printer.say(f"Asked to {command}.{again}")
            self._num_passed_on += 1

    def _bear(self, error: Refusal) -> None:
        if error.client_exit is not ClientExit.UNREACHABLE:
            raise error
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
            self._printer.say(f"{error.message} The job goes on without the server; asking again.")
        elif now - self._silent_since > PATIENCE_S:
            raise error
        time.sleep(WAIT_S)
