"""`simpletuner worker`."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from simpletuner.cli.client import server_url
from simpletuner.cli.job_submit import read_labels
from simpletuner.cli.refusal import ClientExit, Refusal
from simpletuner.config.sources import parse_boolean
from simpletuner.errors import UserError
from simpletuner.worker.agent import Agent, WorkerSettings, check_url
from simpletuner.worker.link import Refused

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def worker(
    *,
    orchestrator_url: str | None = None,
    worker_token: str | None = None,
    name: str | None = None,
    persistent: Annotated[bool, Parameter(negative="")] = False,
    label: Annotated[list[str] | None, Parameter(negative="")] = None,
    ssl_no_verify: Annotated[bool, Parameter(negative="")] = False,
    state_dir: str | None = None,
) -> int:
    """Run jobs of a server on this machine, until SIGTERM. Only this machine dials out: nothing listens here.

    Parameters
    ----------
    orchestrator_url
        Where the server is. Variable SIMPLETUNER_ORCHESTRATOR_URL.
    worker_token
        Token of `simpletuner workers add`. Better in the variable SIMPLETUNER_WORKER_TOKEN, which no list of processes
        shows.
    name
        Under which the server lists it. Variable SIMPLETUNER_WORKER_NAME; default: the name of this machine.
    persistent
        Its jobs go on when it ends, and the server keeps it in its list. Variable SIMPLETUNER_WORKER_PERSISTENT.
        Without, SIGTERM ends its jobs with a checkpoint, and they go on elsewhere.
    label
        key=value that jobs can ask for; may be given more than once. The server's own labels win.
    ssl_no_verify
        Accept any certificate. Variable SIMPLETUNER_SSL_NO_VERIFY.
    state_dir
        Where it keeps pictures, models and caches. Variable SIMPLETUNER_STATE_DIR; default: .simpletuner here.
    """
    environ = os.environ
    url = orchestrator_url or environ.get("SIMPLETUNER_ORCHESTRATOR_URL") or server_url(environ)
    token = worker_token or environ.get("SIMPLETUNER_WORKER_TOKEN")
    if not token:
        message = "A worker needs a token."
        hint = "Make one with `simpletuner workers add NAME`, and set SIMPLETUNER_WORKER_TOKEN to it."
        raise Refusal("unauthenticated", message, ClientExit.DENIED, hint=hint)
    shown = name or environ.get("SIMPLETUNER_WORKER_NAME") or socket.gethostname()
    if not _NAME.fullmatch(shown):
        raise UserError("invalid_config", f"{shown!r} is no name.", hint="Letters, digits, dots, - and _.")
    settings = WorkerSettings(
        url=check_url(url),
        token=token,
        name=shown,
        root=_state_dir(environ, state_dir) / "worker" / shown,
        persistent=persistent or _is_on(environ, "SIMPLETUNER_WORKER_PERSISTENT"),
        labels=read_labels(label) or {},
        verifies_tls=not (ssl_no_verify or _is_on(environ, "SIMPLETUNER_SSL_NO_VERIFY")),
        devices=environ.get("SIMPLETUNER_DEVICES", "auto"),
    )
    try:
        Agent(settings, environ, say=lambda line: print(line, flush=True)).run()
    except Refused as refused:
        exit_code = ClientExit.DENIED if refused.status in {401, 403} else ClientExit.REFUSED
        raise Refusal(refused.code or "refused", refused.message, exit_code, hint=refused.hint) from refused
    return 0


def _state_dir(environ: Mapping[str, str], flag: str | None) -> Path:
    workspace = Path(environ.get("SIMPLETUNER_WORKSPACE") or ".").resolve()
    return workspace / (flag or environ.get("SIMPLETUNER_STATE_DIR") or ".simpletuner")


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return bool(parse_boolean(environ.get(name, "")))
