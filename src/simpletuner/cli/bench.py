"""`simpletuner bench`: figures of this machine, measured in a process of the training world."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

BENCH = "simpletuner.bench"


def bench(
    name: Literal[
        "overhead",
        "loader",
        "cache",
        "server",
        "scale",
        "memory",
        "checkpoint",
        "numerics",
        "ceiling",
        "step",
        "ablate",
        "compile",
    ]
    | None = None,
    *,
    steps: int = 200,
    pictures: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    against: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Measure speed, scale, memory, checkpoints and loss curves against references.

    Figures of the CPU with nano models; `ceiling`, `step`, `ablate` and `compile` are of a GPU with models of full size
    and random weights, and run on a CPU with nano ones.

    Parameters
    ----------
    name
        One of them; without it, all those of the CPU.
    steps
        Steps of each loop that is timed, and of each loss curve; how often `ceiling` repeats, up to ten times.
    pictures
        Pictures that are drawn to work on.
    device
        What `ceiling`, `step`, `ablate` and `compile` run on; `auto` is a GPU where there is one.
    against
        A JSON report of the same device, to tell ratios to; one of another device is refused.
    json
        Print JSON rather than a Markdown table.
    """
    words = [
        *([name] if name else []),
        "--steps",
        str(steps),
        "--pictures",
        str(pictures),
        "--device",
        device,
        *(["--against", str(against)] if against else []),
        *(["--json"] if json else []),
    ]
    return subprocess.run([sys.executable, "-m", BENCH, *words], env=os.environ, check=False).returncode
