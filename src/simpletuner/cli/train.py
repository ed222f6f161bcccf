"""`simpletuner train`: a run in the foreground, through the same job directory and runner as under the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import Parameter

import simpletuner
from simpletuner.cli.client import URL_VARIABLE
from simpletuner.cli.follow import EventPrinter, build_printer
from simpletuner.cli.local_config import LocalConfig, environment_name, print_warnings, read_local_config
from simpletuner.cli.webhooks import post_webhooks
from simpletuner.cli.words import OptionWord, complete_environments
from simpletuner.config.resolve import freeze
from simpletuner.errors import ExitCode
from simpletuner.events import read_journal
from simpletuner.job import Command, CommandName, ExitRecord, JobDir, JobSpec, new_job_id

_POLL_S = 0.1
_SIGNAL_BASE = 128


def train(
    *words: OptionWord,
    env: Annotated[str | None, Parameter(completer=complete_environments)] = None,
    url: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train here and now: simpletuner train --env NAME [key=value …]. Ctrl-C stops with a checkpoint, twice cancels.

    Parameters
    ----------
    words
        key=value, for this run only. A server keeps them in the environment.
    env
        Environment under the configs directory; without one, every option comes from the command line.
    url
        Train at this server, and follow it from here. Variable SIMPLETUNER_URL.
    json
        Print each event as a line of JSON.
    """
    if url or os.environ.get(URL_VARIABLE):
        from simpletuner.cli.remote_train import train_there

        return train_there(url, environment_name(env), words, as_json=json)
    local = read_local_config(env, words)
    print_warnings(local.resolution.warnings)
    job = _freeze(local)
    with post_webhooks(job, local.settings), build_printer(as_json=json) as printer:
        record = _follow(job, local.settings.workspace, printer)
    if not json:
        _print_end(job, record)
    return _exit_code(record)


def _freeze(local: LocalConfig) -> JobDir:
    config, provenance, datasets = freeze(local.resolution)
    job_id = new_job_id()
    spec = JobSpec(
        job_id=job_id,
        config_name=local.environment,
        workspace=str(local.settings.workspace),
        config_dir=str(local.settings.config_dir),
        output_dir=config["output_dir"],
        num_processes=config["num_processes"],
        stop_grace_s=local.settings.stop_grace_s,
    )
    # Not among the server's jobs: a folder there without a row in its table would be removed.
    root = local.settings.foreground_root / job_id
    root.parent.mkdir(parents=True, exist_ok=True)
    return JobDir.create(root, spec, config=config, provenance=provenance, datasets=datasets)


def _follow(job: JobDir, workspace: Path, printer: EventPrinter) -> ExitRecord | None:
    """Run the job to its end, printing its events; signals become commands of the job."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(_python_path()), PYTHONSAFEPATH="1")
    with job.log_path.open("ab") as log:
        runner = subprocess.Popen(
            [sys.executable, "-m", "simpletuner.jobs.runner", str(job.root)],
            cwd=workspace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _ask_to_end(job, printer)) for number in signals}
    offset = 0
    try:
        while True:
            ended = runner.poll() is not None
            for after, line in read_journal(job.journal_path, offset):
                offset = after
                printer.print(line)
            if ended:
                return job.read_exit()
            time.sleep(_POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_end(job: JobDir, printer: EventPrinter) -> Callable[[int, FrameType | None], None]:
    asked: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        command = CommandName.CANCEL if asked else CommandName.STOP
        asked.append(number)
        again = "" if command is CommandName.CANCEL else " Once more to cancel without a checkpoint."
        printer.say(f"Asked to {command.value}.{again}")
        job.send(Command(command=command))

    return on_signal


def _print_end(job: JobDir, record: ExitRecord | None) -> None:
    if record is None:
        print(f"The runner was killed; the log is {job.log_path}", file=sys.stderr)
    elif record.code not in (ExitCode.DONE, ExitCode.STOPPED):
        cause = record.message or f"The trainer was ended by signal {record.signal}."
        print(f"{record.error_code or 'failed'}: {cause}", file=sys.stderr)
        if record.hint:
            print(f"  {record.hint}", file=sys.stderr)
        print(f"  The log is {job.log_path}", file=sys.stderr)


def _exit_code(record: ExitRecord | None) -> int:
    if record is None:
        return _SIGNAL_BASE + signal.SIGKILL
    return record.code if record.code is not None else _SIGNAL_BASE + (record.signal or 0)


def _python_path() -> list[str]:
    """The package this command came from, ahead of what the caller had."""
    own = str(Path(simpletuner.__file__).parents[1])
    return [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
