"""What would become of every file of an environment's datasets: scanned by the code that trains, in its own process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from starlette.concurrency import run_in_threadpool

from simpletuner.config.preflight import PREFLIGHT
from simpletuner.errors import ExitCode, Level, Problem, UserError

MOST_SCANS = 2


@dataclass(frozen=True, slots=True)
class LedgerQuery:
    """`status` and `dataset` choose rows, None all of them."""

    status: str | None
    dataset: str | None
    limit: int
    offset: int

    def wants(self, row: Mapping[str, Any]) -> bool:
        return self.status in {None, row["status"]} and self.dataset in {None, row["dataset"]}


@dataclass(slots=True)
class LedgerPage:
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    total: int = 0
    """Rows that were chosen, on all pages."""
    summary: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """A report per dataset, over all its files."""
    problems: list[Problem] = field(default_factory=list[Problem])
    """What a run would say; errors would end it."""


class LedgerScans:
    """Few at a time: one keeps a core and a disk busy. Those that wait hold no thread."""

    def __init__(self, workspace: Path, environ: Mapping[str, str]) -> None:
        """`workspace` is what relative cache folders are relative to."""
        self._workspace = workspace
        self._environ = dict(environ)
        self._free = asyncio.Semaphore(MOST_SCANS)

    async def scan(self, request: Mapping[str, Any], query: LedgerQuery) -> LedgerPage:
        """Raises UserError where the datasets cannot even be scanned."""
        async with self._free:
            return await run_in_threadpool(self._scan, json.dumps(request).encode(), query)

    def _scan(self, request: bytes, query: LedgerQuery) -> LedgerPage:
        command = [sys.executable, "-m", PREFLIGHT]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=self._environ, cwd=self._workspace) as process:
            try:
                page = _converse(process, request, query)
            except BaseException:
                process.kill()
                raise
        if page.summary and process.returncode in {ExitCode.DONE, ExitCode.DATA}:
            return page
        if page.problems:
            raise UserError.from_problems(page.problems)
        if process.returncode != ExitCode.DONE:
            raise RuntimeError(f"{PREFLIGHT} ended with {process.returncode}; the server's stderr has its last words")
        return page


def _converse(process: subprocess.Popen[bytes], request: bytes, query: LedgerQuery) -> LedgerPage:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request)
    process.stdin.close()
    page = LedgerPage()
    for line in _lines(process.stdout):
        if "summary" in line:
            page.summary.append(line["summary"])
        elif "problem" in line:
            found = line["problem"]
            page.problems.append(Problem(**{**found, "level": Level(found["level"])}))
        elif query.wants(line):
            if query.offset <= page.total < query.offset + query.limit:
                page.rows.append(line)
            page.total += 1
    return page


def _lines(output: IO[bytes]) -> Iterator[dict[str, Any]]:
    for line in output:
        yield cast(dict[str, Any], json.loads(line))
