"""`simpletuner bench`: figures of this machine, measured in a process of the training world."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Annotated, Literal

from cyclopts import Parameter

BENCH = "simpletuner.bench"


def bench(
    name: Literal["overhead", "loader", "cache", "server", "scale", "memory", "checkpoint", "numerics"] | None = None,
    *,
    steps: int = 200,
    pictures: int = 64,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Measure speed, scale, memory, checkpoints and loss curves against references; on the CPU, with nano models.

    Parameters
    ----------
    name
        One of them; without it, all.
    steps
        Steps of each loop that is timed, and of each loss curve.
    pictures
        Pictures that are drawn to work on.
    json
        Print JSON rather than a Markdown table.
    """
    words = [
        *([name] if name else []),
        "--steps",
        str(steps),
        "--pictures",
        str(pictures),
        *(["--json"] if json else []),
    ]
    return subprocess.run([sys.executable, "-m", BENCH, *words], env=os.environ, check=False).returncode
