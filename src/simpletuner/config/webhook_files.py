"""Endpoints with a name: `<config>/webhooks/<name>.json`, for `--webhook_config webhooks/<name>.json`. api.md §2.3."""

from __future__ import annotations

import time
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from simpletuner.config.environments import NAME, to_json
from simpletuner.config.json_text import read_json
from simpletuner.config.webhook import parse_webhooks, unmask_webhooks
from simpletuner.errors import UserError
from simpletuner.job import write_atomic


class WebhookFiles:
    """`root` is the configs directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = root / "webhooks"

    def names(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.json") if NAME.fullmatch(file.stem))

    def read(self, name: str) -> Any:
        """An endpoint or a list of them. Raises UserError `unknown_config`, or `bad_json` with the line."""
        name = name.removesuffix(".json")
        names = self.names()
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else ""
            raise UserError("unknown_config", f"There is no webhook {name!r}.", hint=hint)
        try:
            text = self._path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError("bad_json", f"webhooks/{name}.json is not UTF-8 text.") from error
        return read_json(text, name=f"webhooks/{name}.json")[0]

    def create(self, name: str, config: Any) -> str:
        """The name without `.json`. Raises UserError `invalid_field`, `already_exists` or `invalid_config`."""
        name = name.removesuffix(".json")
        if not NAME.fullmatch(name):
            hint = "Letters, digits, '.', '_' and '-'; at most 64, the first a letter or digit."
            raise UserError("invalid_field", f"{name!r} is not a name for a webhook.", hint=hint, pointer="/name")
        if name in self.names():
            raise UserError("already_exists", f"The webhook {name!r} exists already.", pointer="/name")
        self._write(name, config)
        return name

    def replace(self, name: str, config: Any) -> None:
        """Masked secrets keep what is stored. Raises UserError `unknown_config` or `invalid_config`."""
        try:
            stored = self.read(name)
        except UserError as error:
            if error.code != "bad_json":
                raise
            stored = None
        self._write(name.removesuffix(".json"), unmask_webhooks(config, stored))

    def delete(self, name: str) -> None:
        """Move it to the trash; what it says does not matter."""
        name = name.removesuffix(".json")
        if name not in self.names():
            raise UserError("unknown_config", f"There is no webhook {name!r}.")
        trash = self._root / ".trash"
        trash.mkdir(exist_ok=True)
        self._path(name).rename(trash / f"webhook-{name}.{time.time_ns()}.json")

    def _write(self, name: str, config: Any) -> None:
        problems = parse_webhooks(config, pointer="/config")[1]
        if problems:
            raise UserError.from_problems(problems)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(name), to_json(config))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
