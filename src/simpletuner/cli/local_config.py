"""A configuration for a command that works without a server: directories, environment, argv."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.directories import Directories
from simpletuner.config.environments import Environments
from simpletuner.config.resolve import Resolution, resolve
from simpletuner.config.sources import layer_from_argv
from simpletuner.config.train_config import option_fields
from simpletuner.errors import Problem
from simpletuner.server.settings import ServerSettings

ENVIRONMENT_VARIABLES = ("SIMPLETUNER_ENVIRONMENT", "SIMPLETUNER_ENV", "ENV")


@dataclass(frozen=True, slots=True)
class LocalConfig:
    settings: ServerSettings
    environment: str | None
    resolution: Resolution


def read_local_config(env: str | None, words: Sequence[str], *, for_start: bool = True) -> LocalConfig:
    """Environment `env` (else by variable) under what `words` set. Raises UserError for an unknown environment."""
    settings = ServerSettings.read({}, os.environ, Path.cwd())
    environment = environment_name(env)
    known = option_fields()
    layers = [layer_from_argv(words, name="request", known=known)]
    if environment is not None:
        layers.insert(0, Environments(settings.config_dir).layer(environment, known))
    directories = Directories(settings.workspace, settings.config_dir)
    return LocalConfig(settings, environment, resolve(layers, directories, for_start=for_start))


def environment_name(env: str | None) -> str | None:
    """By flag, else by variable."""
    return env or next((os.environ[name] for name in ENVIRONMENT_VARIABLES if os.environ.get(name)), None)


def print_warnings(warnings: Iterable[Problem]) -> None:
    for problem in warnings:
        hint = f" {problem.hint}" if problem.hint else ""
        print(f"warning: {problem.pointer} {problem.message}{hint}", file=sys.stderr)
