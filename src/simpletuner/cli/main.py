"""The `simpletuner` command: a tree whose branches are imported when they are used, and the edge of its errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from simpletuner import __version__
from simpletuner.cli.refusal import Refusal
from simpletuner.errors import UserError

if TYPE_CHECKING:
    from cyclopts import App

COMMANDS = {
    "server": ("simpletuner.cli.server:server", "Serve the HTTP API."),
    "train": ("simpletuner.cli.train:train", "Train here, in the foreground."),
    "options": ("simpletuner.cli.options:options", "Explain an option, or list them all."),
    "ledger": ("simpletuner.cli.ledger:ledger", "What would become of every file of a dataset."),
    "inspect": ("simpletuner.cli.adapters:inspect", "Say what an adapter file holds and which programs read it."),
    "export": ("simpletuner.cli.adapters:export", "Write an adapter file as diffusers, ComfyUI or kohya read it."),
    "verify-resume": (
        "simpletuner.cli.verify_resume:verify_resume",
        "Show that a killed run goes on exactly, on an environment of yours.",
    ),
    "replay": ("simpletuner.cli.replay:replay", "Run the first steps of a job again and compare its losses."),
    "datasets upload": ("simpletuner.cli.datasets:upload", "Send files, folders and zips to a server."),
    "datasets list": ("simpletuner.cli.datasets:list_entries", "List a folder of a server's datasets."),
    "datasets captions": ("simpletuner.cli.datasets:captions", "Show captions on a server, or write one."),
    "auth login": ("simpletuner.cli.auth:login", "Log in: make a key for this machine and keep it."),
    "auth logout": ("simpletuner.cli.auth:logout", "Revoke this machine's key and forget it."),
    "auth whoami": ("simpletuner.cli.auth:whoami", "Say who you are at the server."),
    "auth keys list": ("simpletuner.cli.auth:list_keys", "List your API keys."),
    "auth keys create": ("simpletuner.cli.auth:create_key", "Make an API key."),
    "auth keys revoke": ("simpletuner.cli.auth:revoke_key", "Revoke an API key."),
    "users list": ("simpletuner.cli.users:list_users", "List users."),
    "users show": ("simpletuner.cli.users:show_user", "Show a user."),
    "users create": ("simpletuner.cli.users:create_user", "Make a user."),
    "users set": ("simpletuner.cli.users:set_user", "Change a user."),
    "users delete": ("simpletuner.cli.users:delete_user", "Delete a user."),
    "users levels list": ("simpletuner.cli.users:list_levels", "List levels."),
    "users levels grant": ("simpletuner.cli.users:grant_level", "Give a level."),
    "users levels withdraw": ("simpletuner.cli.users:withdraw_level", "Take a level."),
    "users permissions list": ("simpletuner.cli.users:list_permissions", "List permissions."),
    "users permissions grant": ("simpletuner.cli.users:grant_permission", "Give a permission beside the levels."),
    "users permissions deny": ("simpletuner.cli.users:deny_permission", "Deny one, whatever the levels say."),
    "users permissions reset": ("simpletuner.cli.users:reset_permission", "Leave it to the levels again."),
    "configs list": ("simpletuner.cli.configs:list_configs", "List environments."),
    "configs show": ("simpletuner.cli.configs:show_config", "Show what an environment sets."),
    "configs create": ("simpletuner.cli.configs:create_config", "Make an environment."),
    "configs set": ("simpletuner.cli.configs:set_options", "Change options of an environment."),
    "configs validate": ("simpletuner.cli.validate:validate", "Say what is wrong with one, also without a server."),
    "configs activate": ("simpletuner.cli.configs:activate_config", "Make it the active one."),
    "configs deactivate": ("simpletuner.cli.configs:deactivate_config", "Have it no longer be the active one."),
    "configs copy": ("simpletuner.cli.configs:copy_config", "Copy an environment."),
    "configs rename": ("simpletuner.cli.configs:rename_config", "Rename an environment."),
    "configs delete": ("simpletuner.cli.configs:delete_config", "Move an environment into the trash."),
    "configs export": ("simpletuner.cli.config_files:export_config", "Print an environment as one JSON object."),
    "configs import": ("simpletuner.cli.config_files:import_config", "Make an environment of an export."),
    "configs history": ("simpletuner.cli.config_files:show_history", "List the versions of an environment."),
    "configs restore": ("simpletuner.cli.config_files:restore_config", "Bring back an earlier version."),
    "jobs submit": ("simpletuner.cli.job_submit:submit", "Queue an environment, or say what would happen."),
    "jobs list": ("simpletuner.cli.jobs:list_jobs", "List jobs; with --watch a table that refreshes."),
    "jobs get": ("simpletuner.cli.jobs:get_job", "Show all that is known of a job."),
    "jobs status": ("simpletuner.cli.jobs:show_status", "Say in a line what a job does."),
    "jobs logs": ("simpletuner.cli.jobs:show_logs", "Print the log of a job."),
    "jobs events": ("simpletuner.cli.jobs:show_events", "Print the events of a job."),
    "jobs wait": ("simpletuner.cli.job_submit:wait", "Wait until a job has ended."),
    "jobs stop": ("simpletuner.cli.jobs:stop", "End a job with a checkpoint."),
    "jobs cancel": ("simpletuner.cli.jobs:cancel", "End jobs now."),
    "jobs pause": ("simpletuner.cli.jobs:pause", "Have a job save and wait."),
    "jobs resume": ("simpletuner.cli.jobs:resume", "Let a paused job go on."),
    "jobs retry": ("simpletuner.cli.job_submit:retry", "Run a job again, as a new one."),
    "jobs delete": ("simpletuner.cli.jobs:delete", "Delete a job that has ended."),
    "jobs approve": ("simpletuner.cli.jobs:approve", "Let a job into the queue."),
    "jobs reject": ("simpletuner.cli.jobs:reject", "End a job that needs approval."),
    "devices": ("simpletuner.cli.devices:devices", "List a server's devices and who holds them."),
    "workers list": ("simpletuner.cli.workers:list_workers", "List machines that dial in."),
    "workers add": ("simpletuner.cli.workers:add_worker", "Make one, and print the command that connects it."),
    "workers drain": ("simpletuner.cli.workers:drain", "Have one finish its job and get no other."),
    "workers undrain": ("simpletuner.cli.workers:undrain", "Give it jobs again."),
    "workers token": ("simpletuner.cli.workers:token", "Give it another token."),
    "workers remove": ("simpletuner.cli.workers:remove", "Remove one."),
    "worker": ("simpletuner.cli.worker:worker", "Run jobs of a server on this machine."),
    "schema": ("simpletuner.cli.schema:schema", "Print the JSON schema of all options."),
    "shutdown": ("simpletuner.cli.shutdown:shutdown", "End a server."),
    "completion": ("simpletuner.cli.completion:completion", "Print a script that completes commands in a shell."),
    "bench": ("simpletuner.cli.bench:bench", "Measure the trainer, the loader and the cache on this machine."),
}
GROUPS = {
    "datasets": "Data on a server.",
    "auth": "Log in at a server, and your API keys.",
    "auth keys": "Your API keys.",
    "users": "Accounts on a server.",
    "users levels": "What users may, by level.",
    "users permissions": "What single users may beside their levels, or may not.",
    "configs": "Environments on a server.",
    "jobs": "Jobs on a server, and its queue.",
    "workers": "Machines that run a server's jobs.",
}
"""A group stands behind the one that it is in. SIMPLETUNER_URL or --url says where the server is."""
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, those of the contract for a user's mistake (api.md §6)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(__version__)
        return 0
    try:
        return _run(words)
    except UserError as error:
        if isinstance(error, Refusal) and error.body is not None and "--json" in words:
            print(json.dumps(error.body))
        print_error(error)
        return int(error.client_exit if isinstance(error, Refusal) else error.exit_code)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (such as `head`) has seen enough; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    from cyclopts import CycloptsError

    try:
        result = build_app()(words, exit_on_error=False)
    except CycloptsError:
        return 2
    return result if isinstance(result, int) else 0


def build_app() -> App:
    from cyclopts import App

    app = App(
        name="simpletuner",
        version=__version__,
        help="Fine-tune diffusion models: start a server, or train right here.",
        result_action="return_value",
    )
    groups = {"": app}
    for path, summary in GROUPS.items():
        parent, _, name = path.rpartition(" ")
        groups[path] = App(name=name, help=summary)
        groups[parent].command(groups[path])
    for path, (place, summary) in COMMANDS.items():
        parent, _, name = path.rpartition(" ")
        groups[parent].command(place, name=name, help=summary)
    return app


def print_error(error: UserError) -> None:
    """Every problem with its place and its cure, on stderr."""
    if not error.problems:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return
    for problem in error.problems:
        print(f"{problem.pointer or '/'}  {problem.code}: {problem.message}", file=sys.stderr)
        if problem.hint:
            print(f"  {problem.hint}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
