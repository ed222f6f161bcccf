"""`simpletuner jobs`: what the jobs of a server are and do."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Annotated, Any

from cyclopts import Parameter

from simpletuner.cli.client import Client, place
from simpletuner.cli.flags import NO_FLAGS, ServerFlags, Switch, columns
from simpletuner.cli.follow import build_printer
from simpletuner.cli.follower import Follower
from simpletuner.cli.job_submit import exit_of_job
from simpletuner.cli.refusal import ClientExit, Refusal
from simpletuner.cli.words import JobId

JOBS = "/api/jobs"
QUEUE = "/api/queue"
REFRESH_S = 2.0
LOG_POLL_S = 0.5
Several = Annotated[list[str] | None, Parameter(negative="")]
Following = Annotated[bool, Parameter(name=["--follow", "-f"], negative="")]
HEADS = ("JOB", "STATUS", "CONFIG", "PRIORITY", "GPUS", "PROGRESS", "POSITION", "REASON")


def list_jobs(
    *,
    status: Several = None,
    config: str | None = None,
    user: str | None = None,
    target: str | None = None,
    since: str | None = None,
    watch: Annotated[bool, Parameter(name=["--watch", "-w"], negative="")] = False,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """List jobs, the newest first.

    Parameters
    ----------
    status
        With this status; may be given more than once.
    config
        Of this environment.
    user
        Of this user: name, e-mail or id.
    target
        With this target.
    since
        Made at or after this time.
    watch
        In a terminal: a table that refreshes until Ctrl-C.
    """
    asked = {"status": status, "config_name": config, "user": user, "target": target, "since": since}
    query = {name: value for name, value in asked.items() if value is not None}
    with flags.client() as client:
        if watch:
            return _watch(client, query, flags)
        for page in client.pages(JOBS, **query):
            flags.show(page, *(columns([HEADS, *map(_row, page["jobs"])]) if page["jobs"] else ()))
    return 0


def get_job(job: JobId, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Show all that is known of a job.

    Parameters
    ----------
    job
        Job.
    """
    with flags.client() as client:
        answer = client.ask("GET", place(JOBS, job))
    shown = ((name, value if isinstance(value, str) else _text(value)) for name, value in answer["job"].items())
    return flags.show(answer, *columns(shown))


def show_status(job: Annotated[JobId | None, Parameter()] = None, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Say in a line what a job does; without one, the active job of yours.

    Parameters
    ----------
    job
        Job.
    """
    query = {} if job is None else {"job_id": job}
    with flags.client() as client:
        answer = client.ask("GET", "/api/training/status", params=query)
        job_id = answer["job_id"]
        if job_id is None or flags.json:
            queue = answer["queue"]
            return flags.show(answer, f"{answer['status']}; {queue['depth']} waiting, {queue['running']} running")
        shown = client.ask("GET", place(JOBS, job_id))["job"]
    return flags.show(answer, *columns([HEADS, _row(shown)]))


def show_logs(job: JobId, *, follow: Following = False, tail: int | None = None, flags: ServerFlags = NO_FLAGS) -> int:
    """Print the log of a job.

    Parameters
    ----------
    job
        Job.
    follow
        Until the job has ended.
    tail
        Only the last lines.
    """
    with flags.client() as client:
        for page in _log_pages(client, job, follow=follow, tail=tail):
            if flags.json:
                print(json.dumps(page), flush=True)
            else:
                print(page["logs"], end="", flush=True)
    return 0


def show_events(job: JobId, *, follow: Following = False, type: Several = None, flags: ServerFlags = NO_FLAGS) -> int:
    """Print the events of a job, in short; with --json each as it is.

    Parameters
    ----------
    job
        Job.
    follow
        Until the job has ended; the shell is told how, as by wait.
    type
        Glob of a type, such as training.*; may be given more than once.
    """
    with flags.client() as client, build_printer(as_json=flags.json) as printer:
        client.ask("GET", place(JOBS, job))
        follower = Follower(client, job, printer, types=type or ())
        if follow:
            return exit_of_job(follower.follow()["status"])
        while follower.read_page():
            pass
    return 0


def stop(job: JobId, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Have a job finish its step, save and end.

    Parameters
    ----------
    job
        Job.
    """
    return _ask_of(job, "stop", flags)


def cancel(*job: JobId, all: Switch = False, flags: ServerFlags = NO_FLAGS) -> int:
    """End jobs now, without a checkpoint.

    Parameters
    ----------
    job
        Jobs.
    all
        All of yours that wait or run.
    """
    if all == bool(job):
        raise Refusal("body_required", "Name jobs, or give --all.", ClientExit.USAGE)
    with flags.client() as client:
        for job_id in _own_jobs(client) if all else job:
            answer = client.ask("POST", place(JOBS, job_id, "cancel"))
            flags.show(answer, f"{job_id}: {answer['message']}")
    return 0


def pause(job: JobId, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Have a job save, give its devices back and wait until it is resumed.

    Parameters
    ----------
    job
        Job.
    """
    return _ask_of(job, "pause", flags)


def resume(job: JobId, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Let a paused job go on.

    Parameters
    ----------
    job
        Job.
    """
    return _ask_of(job, "resume", flags)


def delete(job: JobId, *, purge_output: Switch = False, flags: ServerFlags = NO_FLAGS) -> int:
    """Delete a job that has ended: its row, its folder and its log.

    Parameters
    ----------
    job
        Job.
    purge_output
        The output folder of its run too.
    """
    with flags.client() as client:
        answer = client.ask("DELETE", place(JOBS, job), params={"purge_output": purge_output})
    return flags.show(answer, f"{job} is deleted.")


def approve(job: JobId, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Let a job that needs approval into the queue.

    Parameters
    ----------
    job
        Job.
    """
    return _decide(job, "approve", None, flags)


def reject(job: JobId, *, reason: str | None = None, flags: ServerFlags = NO_FLAGS) -> int:
    """End a job that needs approval.

    Parameters
    ----------
    job
        Job.
    reason
        For its owner.
    """
    return _decide(job, "reject", {"reason": reason}, flags)


def _ask_of(job: str, what: str, flags: ServerFlags) -> int:
    with flags.client() as client:
        answer = client.ask("POST", place(JOBS, job, what))
    return flags.show(answer, f"{job}: {answer['message']}")


def _decide(job: str, what: str, body: Mapping[str, Any] | None, flags: ServerFlags) -> int:
    with flags.client() as client:
        answer = client.ask("POST", place(QUEUE, job, what), json=body)
    return flags.show(answer, f"{job}: {answer['status']}")


def _own_jobs(client: Client) -> list[str]:
    """Those that wait come first: none of them is started in between."""
    own = client.ask("GET", f"{QUEUE}/me")
    return [entry["job_id"] for entry in (*own["pending_jobs"], *own["running_jobs"])]


def _log_pages(client: Client, job: str, *, follow: bool, tail: int | None) -> Iterator[dict[str, Any]]:
    query: dict[str, Any] = {"offset": 0} if tail is None else {"tail": tail}
    while True:
        page = client.ask("GET", place(JOBS, job, "logs"), params=query)
        moved = page["next_offset"] != query.get("offset")
        if page["logs"]:
            yield page
        if page["eof"] or not (follow or (moved and tail is None)):
            return
        query = {"offset": page["next_offset"]}
        if not moved:
            time.sleep(LOG_POLL_S)


def _watch(client: Client, query: Mapping[str, Any], flags: ServerFlags) -> int:
    if flags.json or not sys.stdout.isatty():
        hint = "Leave --json out; in a pipe, list again whenever you like."
        raise Refusal("usage", "--watch needs a terminal.", ClientExit.USAGE, hint=hint)
    from rich.live import Live
    from rich.table import Table

    with Live(auto_refresh=False, screen=True) as live:
        while True:
            room = max(1, os.get_terminal_size().lines - 4)
            jobs = client.ask("GET", JOBS, params={**query, "limit": min(500, room)})["jobs"]
            table = Table(*HEADS, caption=f"{client.url} · {datetime.now():%H:%M:%S} · Ctrl-C ends")
            for job in jobs:
                table.add_row(*("-" if cell is None else str(cell) for cell in _row(job)))
            live.update(table, refresh=True)
            time.sleep(REFRESH_S)


def _row(job: Mapping[str, Any]) -> tuple[object, ...]:
    progress, gpus = job["progress"], job["allocated_gpus"]
    return (
        job["job_id"],
        job["status"],
        job["config_name"],
        job["priority"],
        None if gpus is None else ",".join(map(str, gpus)),
        None if progress is None else f"{progress['step']}/{progress['total_steps']}",
        job["queue_position"],
        job["status_reason"],
    )


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)
