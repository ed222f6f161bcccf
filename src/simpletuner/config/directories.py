"""The two folders that relative paths are looked for in. api.md §1.7."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PLACEHOLDER = re.compile(r"\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, slots=True)
class Directories:
    workspace: Path
    config: Path

    def locate(self, path: str) -> Path:
        """A file named by an option: under the workspace if it is there, else under the configs directory."""
        places = self.candidates(path)
        return places[0] if places[0].exists() else places[-1]

    def candidates(self, path: str) -> list[Path]:
        """Where `locate` looks, in order."""
        written = Path(path).expanduser()
        return [written] if written.is_absolute() else [self.workspace / written, self.config / written]

    def absolute(self, path: str) -> str:
        """A folder named by an option, under the workspace."""
        return str(self.workspace / Path(path).expanduser())


def expand_placeholders(value: Any) -> tuple[Any, list[str]]:
    """Replace `{env:NAME}` in every string inside `value`; also the names that are not set."""
    missing: list[str] = []

    def replace(match: re.Match[str]) -> str:
        found = os.environ.get(match.group(1))
        if found is None:
            missing.append(match.group(1))
            return match.group()
        return found

    def walk(part: Any) -> Any:
        if isinstance(part, str):
            return _PLACEHOLDER.sub(replace, part)
        if isinstance(part, list):
            return [walk(item) for item in part]  # pyright: ignore[reportUnknownVariableType]
        if isinstance(part, dict):
            return {key: walk(item) for key, item in part.items()}  # pyright: ignore[reportUnknownVariableType]
        return part

    return walk(value), missing
