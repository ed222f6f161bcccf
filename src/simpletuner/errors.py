"""Errors a person can mend, and the exit codes that processes speak with."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum, StrEnum
from typing import Any


class ExitCode(IntEnum):
    """The vocabulary between trainer, runner, supervisor and shell (training.md, head)."""

    DONE = 0
    CONFIG = 64
    DATA = 65
    OUTSIDE = 69
    BUG = 70
    OUT_OF_MEMORY = 71
    DIVERGED = 72
    STORAGE = 73
    STOPPED = 75


class Level(StrEnum):
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One finding about what a person wrote: where it is, what is wrong, how to mend it."""

    code: str
    message: str
    hint: str = ""
    pointer: str = ""
    option: str | None = None
    level: Level = Level.ERROR

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; `level` is left out, because answers list errors and warnings apart."""
        row = asdict(self)
        del row["level"]
        return row


class UserError(Exception):
    """A failure that the user, not the programmer, can mend.

    `code` is snake_case and stable, `pointer` a JSON pointer into what was written, `problems` all findings when
    there is more than one.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        pointer: str = "",
        exit_code: ExitCode = ExitCode.CONFIG,
        problems: Iterable[Problem] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.pointer = pointer
        self.exit_code = exit_code
        self.problems: tuple[Problem, ...] = tuple(problems)

    @classmethod
    def from_problems(cls, problems: Sequence[Problem], *, code: str = "invalid_config") -> UserError:
        """One error that carries every error-level problem; its sentence is the first one's."""
        errors = errors_of(problems)
        more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
        return cls(code, errors[0].message + more, hint=errors[0].hint, pointer=errors[0].pointer, problems=errors)

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


@contextmanager
def placed(pointer: str) -> Generator[None]:
    """Errors from within have pointers relative to `pointer`."""
    try:
        yield
    except UserError as error:
        error.pointer = pointer + error.pointer
        raise


def errors_of(problems: Iterable[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.level is Level.ERROR]


def warnings_of(problems: Iterable[Problem]) -> list[Problem]:
    return [problem for problem in problems if problem.level is Level.WARNING]
