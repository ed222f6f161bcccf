"""`simpletuner workers`: machines that dial in to run a server's jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import Parameter

from simpletuner.cli.client import Client, place
from simpletuner.cli.flags import NO_FLAGS, ServerFlags, Switch, columns
from simpletuner.cli.job_submit import read_labels
from simpletuner.cli.refusal import ClientExit, Refusal
from simpletuner.cli.words import WorkerName

WORKERS = "/api/admin/workers"
HEADS = ("NAME", "STATUS", "DEVICES", "JOB", "LABELS", "ID")
Status = Literal["connecting", "idle", "busy", "draining", "quarantined", "offline"]


def list_workers(*, status: Status | None = None, flags: ServerFlags = NO_FLAGS) -> int:
    """List workers.

    Parameters
    ----------
    status
        Only those that are so.
    """
    with flags.client() as client:
        for page in client.pages(WORKERS, **({"status_filter": status} if status else {})):
            flags.show(page, *(columns([HEADS, *map(_row, page["workers"])]) if page["workers"] else ()))
    return 0


def add_worker(
    name: str,
    *,
    ephemeral: Switch = False,
    label: Annotated[list[str] | None, Parameter(negative="")] = None,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Make a worker, and print the command that connects it. Its token is shown this once.

    Parameters
    ----------
    name
        Letters, digits, dots, - and _.
    ephemeral
        The server forgets it an hour after it went away.
    label
        key=value that jobs can ask for; may be given more than once.
    """
    body: dict[str, Any] = {"name": name, "worker_type": "ephemeral" if ephemeral else "persistent"}
    body |= {"labels": read_labels(label) or {}}
    with flags.client() as client:
        made = client.ask("POST", WORKERS, json=body)
    return flags.show(made, f"Worker {name} is {made['worker_id']}. On its machine:", made["connection_command"])


def drain(worker: WorkerName, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Have a worker finish its job and get no other.

    Parameters
    ----------
    worker
        Name or id.
    """
    return _post(worker, "drain", flags)


def undrain(worker: WorkerName, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Give a worker jobs again.

    Parameters
    ----------
    worker
        Name or id.
    """
    return _post(worker, "undrain", flags)


def token(worker: WorkerName, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Give a worker another token. The one that it has opens nothing any more; its job goes on.

    Parameters
    ----------
    worker
        Name or id.
    """
    with flags.client() as client:
        made = client.ask("POST", place(WORKERS, _find(client, worker)["worker_id"], "token"))
    return flags.show(made, "On its machine:", made["connection_command"])


def remove(worker: WorkerName, *, force: Switch = False, flags: ServerFlags = NO_FLAGS) -> int:
    """Remove a worker.

    Parameters
    ----------
    worker
        Name or id.
    force
        Also one that has a job, which then goes on elsewhere from its newest checkpoint.
    """
    with flags.client() as client:
        found = _find(client, worker)
        answer = client.ask("DELETE", place(WORKERS, found["worker_id"]), params={"force": force})
    return flags.show(answer, f"Worker {found['name']} is removed.")


def _post(worker: str, what: str, flags: ServerFlags) -> int:
    with flags.client() as client:
        found = _find(client, worker)
        answer = client.ask("POST", place(WORKERS, found["worker_id"], what))
    return flags.show(answer, f"Worker {found['name']} is {answer['status']}.")


def _find(client: Client, worker: str) -> dict[str, Any]:
    """By id, else by name."""
    for page in client.pages(WORKERS):
        for found in page["workers"]:
            if worker in (found["worker_id"], found["name"]):
                return found
    hint = "`simpletuner workers list` names them."
    raise Refusal("unknown_worker", f"There is no worker {worker}.", ClientExit.REFUSED, hint=hint)


def _row(worker: dict[str, Any]) -> tuple[object, ...]:
    labels = ",".join(f"{key}={value}" for key, value in sorted(worker["labels"].items()))
    devices = f"{worker['gpu_count']} × {worker['gpu_name']}" if worker["gpu_name"] else None
    return worker["name"], worker["status"], devices, worker["current_job_id"], labels or None, worker["worker_id"]
