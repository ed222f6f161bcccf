"""`simpletuner ledger`: what would become of every file of an environment's datasets, without training."""

from __future__ import annotations

import json as json_text
import os
import subprocess
import sys
from typing import Annotated, Any

from cyclopts import Parameter

from simpletuner.cli.local_config import print_warnings, read_local_config
from simpletuner.cli.words import LocalName
from simpletuner.config.preflight import PREFLIGHT, preflight_request
from simpletuner.errors import ExitCode


def ledger(
    env: LocalName, *words: Annotated[str, Parameter(show=False)], json: Annotated[bool, Parameter(negative="")] = False
) -> int:
    """Scan an environment's datasets: what is kept, what is dropped and why.

    Parameters
    ----------
    env
        Environment under the configs directory.
    json
        Print one JSON line per file.
    """
    local = read_local_config(env, words)
    print_warnings(local.resolution.warnings)
    request = preflight_request(local.resolution.require())
    # Scanning belongs to the training world: it is asked through its process, not imported.
    scan = subprocess.run(
        [sys.executable, "-m", PREFLIGHT],
        input=json_text.dumps(request).encode(),
        stdout=subprocess.PIPE,
        env=os.environ,
        check=False,
    )
    if scan.returncode not in (ExitCode.DONE, ExitCode.DATA):
        return scan.returncode
    for line in scan.stdout.decode().splitlines():
        row: dict[str, Any] = json_text.loads(line)
        if json:
            print(line)
        elif "summary" in row:
            _print_summary(row["summary"])
        elif "problem" in row:
            problem = row["problem"]
            print(f"{problem['level']}: {problem['message']} {problem['hint']}", file=sys.stderr)
    return scan.returncode


def _print_summary(summary: dict[str, Any]) -> None:
    print(f"{summary['id']}: {summary['kept']} of {summary['found']} pictures are used")
    for reason, count in summary["dropped"].items():
        print(f"  dropped, {reason}: {count}")
    for bucket, count in sorted(summary["buckets"].items(), key=lambda pair: -pair[1]):
        print(f"  bucket {bucket}: {count}")
