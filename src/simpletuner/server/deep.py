"""The deep half of a validation: data, model and memory, looked at by the code that trains, in its own process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from simpletuner.config.resolve import Resolution, provenance_of
from simpletuner.errors import Level, Problem, UserError

MODULE = "simpletuner.train.preflight"
PLANS = ("memory_plan", "disk_plan", "fit")


@dataclass(frozen=True, slots=True)
class DeepFindings:
    """Plans are bytes, and a sentence (`message`); None where the data or the model cannot be read."""

    problems: list[Problem]
    memory_plan: dict[str, Any] | None = None
    disk_plan: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    """Settings that fit a budget, if one was given."""

    def note(self) -> str:
        """What the plans say, in one paragraph."""
        return " ".join(plan["message"] for plan in (self.memory_plan, self.disk_plan, self.fit) if plan)


def budget_bytes(gigabytes: float | None) -> int | None:
    """A GB is 10⁹ bytes: what a card's name promises, it has at least."""
    return None if gigabytes is None else round(gigabytes * 1e9)


class DeepValidation:
    """One at a time: it takes a core for some seconds."""

    def __init__(self, workspace: Path, environ: Mapping[str, str]) -> None:
        self._workspace = workspace
        self._environ = dict(environ)
        self._free = asyncio.Semaphore(1)

    async def look(self, resolution: Resolution, fit_budget_bytes: int | None = None) -> DeepFindings:
        """Of a configuration without errors. Raises UserError `not_implemented` where there is no torch."""
        if find_spec("torch") is None:
            hint = "Install simpletuner with an extra such as `cpu` or `cuda`, or ask a server that has it."
            raise UserError("not_implemented", "To look this deep takes torch, which is not installed.", hint=hint)
        asked = {
            "config": resolution.require().to_flat(),
            "provenance": provenance_of(resolution),
            "datasets": resolution.datasets,
            "fit_budget_bytes": fit_budget_bytes,
        }
        request = json.dumps(asked).encode()
        async with self._free:
            return await run_in_threadpool(self._look, request)

    def _look(self, request: bytes) -> DeepFindings:
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            input=request,
            stdout=subprocess.PIPE,
            env=self._environ,
            cwd=self._workspace,
            check=True,
        )
        found = json.loads(done.stdout)
        problems = [Problem(**{**row, "level": Level(row["level"])}) for row in found["problems"]]
        return DeepFindings(problems, found["memory_plan"], found["disk_plan"], found["fit"])
