"""`simpletuner train` at a server: the run is submitted there and followed here."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from simpletuner.cli.client import Client
from simpletuner.cli.follow import build_printer
from simpletuner.cli.follower import COMMANDS, Follower
from simpletuner.cli.local_config import print_warnings
from simpletuner.cli.words import form
from simpletuner.errors import ExitCode, Level, Problem
from simpletuner.job import JobStatus

_NO_ENVIRONMENT = "-"
_SIGNAL_BASE = 128


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
            job = Follower(client, started["job_id"], printer, signals).follow()
        if not as_json:
            _print_end(job, client.url)
    return exit_code_of(job)


@contextmanager
def _counted_signals() -> Generator[list[int]]:
    """Those that have come: the first two ask the job to end, the third leaves it alone."""
    come: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        come.append(number)
        if len(come) > len(COMMANDS):
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
