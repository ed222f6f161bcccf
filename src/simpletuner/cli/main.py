"""The `simpletuner` command: a tree whose branches are imported when they are used, and the edge of its errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from simpletuner import __version__
from simpletuner.cli.refusal import Refusal
from simpletuner.errors import UserError

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
    "bench": ("simpletuner.cli.bench:bench", "Measure the trainer, the loader and the cache on this machine."),
}
GROUPS = {"datasets": "Data on a server: SIMPLETUNER_URL says where, SIMPLETUNER_API_KEY with which key."}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, those of the contract for a user's mistake (api.md §6)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(__version__)
        return 0
    try:
        return _run(words)
    except UserError as error:
        print_error(error)
        return int(error.client_exit if isinstance(error, Refusal) else error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe (such as `head`) has seen enough; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    from cyclopts import App, CycloptsError

    app = App(
        name="simpletuner",
        version=__version__,
        help="Fine-tune diffusion models: start a server, or train right here.",
        result_action="return_value",
    )
    groups = {name: App(name=name, help=summary) for name, summary in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for path, (place, summary) in COMMANDS.items():
        group, _, name = path.rpartition(" ")
        (groups[group] if group else app).command(place, name=name, help=summary)
    try:
        result = app(words, exit_on_error=False)
    except CycloptsError:
        return 2
    return result if isinstance(result, int) else 0


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
