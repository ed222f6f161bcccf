"""`simpletuner jobs submit`, `retry` and `wait`: into the queue, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from simpletuner.cli.client import Client, place
from simpletuner.cli.flags import NO_FLAGS, ServerFlags, Switch, columns
from simpletuner.cli.follow import QuietPrinter
from simpletuner.cli.follower import Follower
from simpletuner.cli.refusal import ClientExit, JobExit, Refusal
from simpletuner.cli.words import JobId, StoredName, complete_options, typed_options
from simpletuner.job import JobStatus

Settings = Annotated[list[str] | None, Parameter(name="--set", negative="", completer=complete_options)]
Labels = Annotated[list[str] | None, Parameter(name="--label", negative="")]
_UNTIL_THE_END = ("job.status",)


def submit(
    config: StoredName,
    *,
    no_wait: Switch = False,
    any_gpu: Switch = False,
    dry_run: Annotated[bool, Parameter(name=["--dry-run", "-n"], negative="")] = False,
    target: Annotated[Literal["auto", "local", "worker"], Parameter(name=["--target", "-t"])] = "auto",
    label: Labels = None,
    priority: int | None = None,
    for_approval: Switch = False,
    max_attempts: int | None = None,
    set_: Settings = None,
    wait: Switch = False,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Queue a stored environment. It starts at once where devices are free.

    The shell is told 0 (accepted, or would run), 3 (a dry run: would queue), 4 (rejected, or would be); with --wait how
    the job ended: 0 completed, 8 failed, lost or rejected, 9 stopped or cancelled.

    Parameters
    ----------
    config
        Environment of the server.
    no_wait
        Be rejected rather than wait.
    any_gpu
        Take other devices than the configured ones.
    dry_run
        Say what would happen; nothing is written.
    target
        Where it may run.
    label
        key=glob that a worker's label must match; may be given more than once.
    priority
        0 to 50, in place of your level's.
    for_approval
        Wait until somebody approves it.
    max_attempts
        How often it is begun when its machine fails.
    set_
        key=value for this job alone; may be given more than once.
    wait
        Wait for its end.
    """
    body: dict[str, Any] = {
        "config_name": config,
        "no_wait": no_wait,
        "any_gpu": any_gpu,
        "dry_run": dry_run,
        "target": target,
        "for_approval": for_approval,
        "overrides": typed_options(set_ or ()),
    }
    given = {"worker_labels": read_labels(label), "priority": priority, "max_attempts": max_attempts}
    body |= {name: value for name, value in given.items() if value is not None}
    with flags.client() as client:
        answer = _enqueue(client, "/api/queue/submit", body)
        _print(answer, flags)
        if dry_run or not answer["success"] or not wait:
            return _exit_of(answer)
        return _wait(client, answer["job_id"], flags)


def retry(
    job: JobId, *, set_: Settings = None, no_resume: Switch = False, wait: Switch = False, flags: ServerFlags = NO_FLAGS
) -> int:
    """Run a job that has ended again, as a new one. Exit codes are those of submit.

    Parameters
    ----------
    job
        Job.
    set_
        key=value in which the new one differs; may be given more than once.
    no_resume
        From the beginning, not from the newest checkpoint.
    wait
        Wait for its end.
    """
    body = {"overrides": typed_options(set_ or ()), "resume": not no_resume}
    with flags.client() as client:
        answer = _enqueue(client, place("/api/jobs", job, "retry"), body)
        _print(answer, flags)
        return _wait(client, answer["job_id"], flags) if wait and answer["success"] else _exit_of(answer)


def wait(job: JobId, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Wait until a job has ended. Tells the shell 0 completed, 8 failed, lost or rejected, 9 stopped or cancelled.

    Parameters
    ----------
    job
        Job.
    """
    with flags.client() as client:
        return _wait(client, job, flags)


def exit_of_job(status: str) -> JobExit:
    """Of one that has ended."""
    if status == JobStatus.COMPLETED:
        return JobExit.DONE
    return JobExit.ENDED if status in {JobStatus.STOPPED, JobStatus.CANCELLED} else JobExit.FAILED


def _enqueue(client: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """A rejection is an answer too."""
    try:
        return client.ask("POST", path, json=body)
    except Refusal as error:
        if error.code != "gpus_unavailable" or error.body is None:
            raise
        rejected = {"success": False, "job_id": None, "status": "rejected", "reason": error.message}
        return rejected | dict(error.body)


def _print(answer: dict[str, Any], flags: ServerFlags) -> None:
    gpus = answer.get("allocated_gpus")
    rows = [
        ("Job ID", answer["job_id"]),
        ("Status", f"would be {answer['status']}" if answer.get("dry_run") else answer["status"]),
        ("GPUs", None if gpus is None else ",".join(map(str, gpus))),
        ("Worker", answer.get("allocated_worker_id")),
        ("Queue Position", answer.get("queue_position")),
        ("Reason", answer.get("reason")),
    ]
    flags.show(answer, *columns((f"{name}:", value) for name, value in rows))


def _exit_of(answer: dict[str, Any]) -> int:
    if not answer["success"]:
        return JobExit.REJECTED
    return JobExit.WOULD_QUEUE if answer.get("dry_run") and answer["status"] != "running" else JobExit.DONE


def _wait(client: Client, job_id: str, flags: ServerFlags) -> int:
    job = Follower(client, job_id, QuietPrinter(), types=_UNTIL_THE_END).follow()
    why = (job["exit"] or {}).get("message") or job["status_reason"]
    says_more = why and why.lower() != job["status"]
    flags.show({"job": job}, f"Job {job_id} is {job['status']}." + (f" {why}" if says_more else ""))
    return exit_of_job(job["status"])


def read_labels(written: Sequence[str] | None) -> dict[str, str] | None:
    if written is None:
        return None
    labels: dict[str, str] = {}
    for word in written:
        key, equals, glob = word.partition("=")
        if not key or not equals:
            message = f"--label {word} is not key=glob."
            raise Refusal("invalid_field", message, ClientExit.USAGE, hint="For example --label gpu_type=a100*")
        labels[key] = glob
    return labels
