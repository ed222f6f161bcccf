"""What a command that asks a server ends with when the server says no, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

from simpletuner.errors import Problem, UserError


class ClientExit(IntEnum):
    """Apart from the codes of runs: a trainer that ends with 1 is a bug (api.md §6)."""

    REFUSED = 1
    USAGE = 2
    DENIED = 5
    UNREACHABLE = 6


class JobExit(IntEnum):
    """Of commands whose answer is what becomes of a job (api.md §6)."""

    DONE = 0
    WOULD_QUEUE = 3
    REJECTED = 4
    FAILED = 8
    ENDED = 9


class Refusal(UserError):
    """`client_exit` is what the shell is told, `body` what the server answered, None where it did not."""

    def __init__(
        self,
        code: str,
        message: str,
        client_exit: ClientExit,
        *,
        hint: str = "",
        problems: Iterable[Problem] = (),
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(code, message, hint=hint, problems=problems)
        self.client_exit = client_exit
        self.body = body
