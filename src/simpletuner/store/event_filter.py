"""Which event types a reader wants: globs with `*` and `?`, the same in SQL and in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select

from simpletuner.errors import UserError
from simpletuner.store.schema import events

MOST_GLOBS = 50
MOST_GLOB_CHARS = 64


@dataclass(frozen=True)
class EventFilter:
    """Empty `types` means all; `job_id` None means every job and the server's own events."""

    job_id: str | None = None
    types: tuple[str, ...] = ()
    sees: Callable[[], set[str]] | None = None
    """The only jobs whose events are wanted, asked anew each time; None for all."""
    server_types: frozenset[str] | None = None
    """The only types of events without a job that are wanted; None for all."""

    @classmethod
    def parse(cls, *, job_id: str | None = None, types: Iterable[str] = ()) -> EventFilter:
        """Each of `types` may be a comma list. Raises UserError `invalid_field` for more than a query can hold."""
        wanted = tuple(glob.strip() for part in types for glob in part.split(",") if glob.strip())
        if len(wanted) > MOST_GLOBS or any(len(glob) > MOST_GLOB_CHARS for glob in wanted):
            message = f"types takes at most {MOST_GLOBS} globs of at most {MOST_GLOB_CHARS} characters."
            raise UserError("invalid_field", message, pointer="/types")
        return cls(job_id=job_id, types=wanted)

    def accepts(self, *, job_id: str | None, type_: str) -> bool:
        if self.job_id is not None and job_id != self.job_id:
            return False
        if not self._is_in_sight(job_id, type_):
            return False
        return not self.types or self._pattern.fullmatch(type_) is not None

    def clause(self) -> ColumnElement[bool]:
        wanted: list[ColumnElement[bool]] = []
        if self.job_id is not None:
            wanted.append(events.c.job_id == self.job_id)
        of_server = events.c.job_id.is_(None)
        if self.server_types is not None:
            wanted.append(or_(~of_server, events.c.type.in_(self.server_types)))
        if self.sees is not None:
            wanted.append(or_(of_server, among(events.c.job_id, self.sees())))
        if self.types:
            wanted.append(or_(*(events.c.type.like(_as_like(glob), escape="\\") for glob in self.types)))
        return and_(True, *wanted)

    def _is_in_sight(self, job_id: str | None, type_: str) -> bool:
        if job_id is None:
            return self.server_types is None or type_ in self.server_types
        return self.sees is None or job_id in self.sees()

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        globs = (re.escape(glob).replace(r"\*", ".*").replace(r"\?", ".") for glob in self.types)
        # LIKE does not look at case either.
        return re.compile("|".join(globs), re.IGNORECASE)


def among(column: ColumnElement[Any], values: Iterable[str]) -> ColumnElement[bool]:
    """One bound value, however many there are: the event database is always SQLite."""
    given = func.json_each(json.dumps(sorted(values))).table_valued("value")
    return column.in_(select(given.c.value))


def _as_like(glob: str) -> str:
    escaped = re.sub(r"([\\%_])", r"\\\1", glob)
    return escaped.replace("*", "%").replace("?", "_")
