"""`simpletuner train` at a server: the run is submitted there and followed here."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from simpletuner.cli.client import Client, place
from simpletuner.cli.follow import EventPrinter, build_printer
from simpletuner.cli.local_config import print_warnings
from simpletuner.cli.refusal import ClientExit, Refusal
from simpletuner.cli.words import form
from simpletuner.errors import ExitCode, Level, Problem
from simpletuner.job import JobStatus

WAIT_S = 1.0
"""How long the server keeps a question for new events, and Ctrl-C may wait."""
PATIENCE_S = 120.0
"""A server that is restarted is back by then."""
_NO_ENVIRONMENT = "-"
_SIGNAL_BASE = 128
_COMMANDS = ("stop", "cancel")


def train_there(url: str | None, environment: str | None, words: Sequence[str], *, as_json: bool) -> int:
    """The exit code is that of the trainer (api.md §4), as if it had run here."""
    with Client(os.environ, url=url) as client:
        query = {"environment": environment or _NO_ENVIRONMENT}
        started = client.ask("POST", "/api/training/start", params=query, data=form(words))
        print_warnings(Problem(**item, level=Level.WARNING) for item in started["warnings"])
        with _counted_signals() as signals, build_printer(as_json=as_json) as printer:
            printer.say(f"{started['message']} at {client.url}: job {started['job_id']}")
            if started["reason"]:
                printer.say(f"  {started['reason']}")
            if started["config_written"]:
                printer.say(f"  Its settings are kept in {started['config_written']} there.")
            job = _Follower(client, started["job_id"], printer, signals).follow()
        if not as_json:
            _print_end(job, client.url)
    return exit_code_of(job)


class _Follower:
    """Prints a job's events until it has ended, and passes on what the person asks meanwhile."""

    def __init__(self, client: Client, job_id: str, printer: EventPrinter, signals: list[int]) -> None:
        self._client = client
        self._job_id = job_id
        self._printer = printer
        self._signals = signals
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
        query = {
            "job_id": self._job_id,
            "since_index": self._next_index,
            "wait": 0 if job["is_terminal"] else WAIT_S,
            "images": "url",
        }
        page = self._client.ask("GET", "/api/training/events", params=query)
        for event in page["events"]:
            self._printer.print(json.dumps(event).encode() + b"\n")
        self._next_index = page["next_index"]
        return job if job["is_terminal"] and not page["has_more"] else None

    def _pass_on(self) -> None:
        while self._num_passed_on < min(len(self._signals), len(_COMMANDS)):
            command = _COMMANDS[self._num_passed_on]
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


@contextmanager
def _counted_signals() -> Generator[list[int]]:
    """Those that have come: the first two ask the job to end, the third leaves it alone."""
    come: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        come.append(number)
        if len(come) > len(_COMMANDS):
            raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield come
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _print_end(job: dict[str, Any], url: str) -> None:
    status, end = job["status"], job["exit"] or {}
    if status in {JobStatus.COMPLETED, JobStatus.STOPPED, JobStatus.CANCELLED}:
        return
    cause = end.get("message") or job["status_reason"] or f"The job is {status}."
    print(f"{end.get('error_code') or status}: {cause}", file=sys.stderr)
    if end.get("hint"):
        print(f"  {end['hint']}", file=sys.stderr)
    for line in end.get("log_tail") or ():
        print(f"  | {line}", file=sys.stderr)
    print(f"  The log is {url}/api/jobs/{job['job_id']}/logs", file=sys.stderr)


def exit_code_of(job: Mapping[str, Any]) -> int:
    """Of a job that has ended; one whose end nobody knows counts as killed."""
    if job["status"] == JobStatus.COMPLETED:
        return ExitCode.DONE
    if job["status"] in {JobStatus.STOPPED, JobStatus.CANCELLED}:
        return ExitCode.STOPPED
    end = job["exit"] or {}
    return end.get("code") or _SIGNAL_BASE + (end.get("signal") or signal.SIGKILL)
