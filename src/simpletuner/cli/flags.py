"""What all commands that ask a server have in common: where they ask, and how they show the answer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from simpletuner.cli.client import URL_VARIABLE, Client
from simpletuner.cli.refusal import ClientExit, Refusal

Switch = Annotated[bool, Parameter(negative="")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    url: Annotated[str | None, Parameter(help=f"Server to ask. Variable {URL_VARIABLE}.")] = None
    json: Annotated[bool, Parameter(negative="", help="Print the server's answer as it is, a line each.")] = False

    @property
    def names_server(self) -> bool:
        """Of commands that work without one too."""
        return bool(self.url or os.environ.get(URL_VARIABLE))

    def client(self, *, key: str | None = None) -> Client:
        return Client(os.environ, url=self.url, key=key)

    def show(self, body: Any, *lines: str) -> int:
        """The body with --json, else the lines; the exit code of what went well."""
        if self.json:
            print(json.dumps(body))
        else:
            for line in lines:
                print(line)
        return 0


NO_FLAGS = ServerFlags()


def nothing_to_set(hint: str) -> Refusal:
    return Refusal("body_required", "There is nothing to set.", ClientExit.USAGE, hint=hint)


def columns(rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines in which the cells stand below each other; None is a dash."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
