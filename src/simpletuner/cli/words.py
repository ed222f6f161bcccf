"""`key=value` words of a command line: completed by the shell, and typed for a JSON body."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from simpletuner.cli.client import URL_VARIABLE, Client
from simpletuner.cli.refusal import Refusal
from simpletuner.config.environments import Environments
from simpletuner.config.sources import NOT_GIVEN, parse_value, split_argv
from simpletuner.config.train_config import option_fields
from simpletuner.server.settings import ServerSettings

if TYPE_CHECKING:
    from cyclopts.completion import CompletionContext

COMPLETION_S = 2.0
"""Longer than this nobody waits for a key to answer."""


def complete_options(context: CompletionContext) -> list[tuple[str, str]]:
    """`name=`; what stands behind the = is the person's."""
    if "=" in context.incomplete:
        return []
    options = (option for option in option_fields().values() if not option.ui.later)
    return [(f"{option.name}=", option.help.strip().partition("\n")[0]) for option in options]


def complete_environments(_context: CompletionContext) -> list[str]:
    """Of the server that the environment names, else of the configs directory."""
    if os.environ.get(URL_VARIABLE):
        return _environments_of_server()
    return Environments(ServerSettings.read({}, os.environ, Path.cwd()).config_dir).names()


def complete_stored(_context: CompletionContext) -> list[str]:
    """Of the server that a command without flags asks."""
    return _environments_of_server()


def complete_jobs(_context: CompletionContext) -> list[tuple[str, str]]:
    """The newest, each with what it is."""
    jobs = _ask_server("/api/jobs", "jobs")
    return [(job["job_id"], f"{job['status']} {job['config_name'] or ''}".rstrip()) for job in jobs]


def complete_workers(_context: CompletionContext) -> list[tuple[str, str]]:
    return [(worker["name"], worker["status"]) for worker in _ask_server("/api/admin/workers", "workers")]


def _environments_of_server() -> list[str]:
    return [config["name"] for config in _ask_server("/api/configs", "configs")]


def _ask_server(path: str, part: str) -> list[dict[str, Any]]:
    """A list; empty where no server answers in time."""
    try:
        with Client(os.environ) as client:
            return client.ask("GET", path, params={"limit": 500}, timeout=COMPLETION_S)[part]
    except Refusal:
        return []


OptionWord = Annotated[str, Parameter(allow_leading_hyphen=True, completer=complete_options)]
LocalName = Annotated[str, Parameter(completer=complete_environments)]
StoredName = Annotated[str, Parameter(completer=complete_stored)]
JobId = Annotated[str, Parameter(completer=complete_jobs)]
WorkerName = Annotated[str, Parameter(completer=complete_workers)]


def form(words: Sequence[str]) -> dict[str, list[str]]:
    """Fields of a form, whose text the server types."""
    fields: dict[str, list[str]] = {}
    for name, text in split_argv(words, option_fields()):
        fields.setdefault(name, []).append(text)
    return fields


def typed_options(words: Sequence[str]) -> dict[str, Any]:
    """For JSON: numbers as numbers, `key=` as the option's "off" value, or null, which unsets it.

    What is wrong stays as it was written: the server says what is wrong with it.
    """
    known = option_fields()
    typed: dict[str, Any] = {}
    for written, text in split_argv(words, known):
        name = written.removeprefix("--")
        value: Any = text
        if name in known:
            value, problem = parse_value(known[name], text, is_text=True)
            value = text if problem else None if value is NOT_GIVEN else value
        typed[f"--{name}"] = value
    return typed
