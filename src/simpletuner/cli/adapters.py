"""`simpletuner inspect` and `simpletuner export`: adapter files, apart from any run."""

from __future__ import annotations

import json as json_text
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from simpletuner.errors import ExitCode, Problem, UserError

ADAPTERS = "simpletuner.adapters"


def inspect(file: Path, *, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Say what an adapter file holds: kind, family, algorithm, rank, alpha, and which programs read it.

    Parameters
    ----------
    file
        A .safetensors adapter.
    json
        Print JSON, the header included.
    """
    found = _ask("inspect", str(file))
    if json:
        print(json_text.dumps(found, indent=2))
        return 0
    rows = {
        "file": found["file"],
        "kind": found["kind"],
        "family": found["family"] or f"not stated; names fit {_joined(found['fits'])}",
        "algorithm": _joined(found["algorithms"]),
        "rank": _joined(found["rank"]),
        "alpha": _joined(found["alpha"]) if found["alpha"] else "not stated, so equal to the rank",
        "modules": found["modules"],
        "dtype": _joined(found["dtype"]),
        "size": f"{found['bytes'] / 1e6:.1f} MB",
        "read by": _joined(found["readers"]),
    }
    for name, value in rows.items():
        print(f"{name + ':':<11}{value}")
    return 0


def export(
    file: Path,
    *,
    to: Literal["diffusers", "comfyui", "kohya"],
    output: Path | None = None,
    family: str | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Write an adapter file anew as another program reads it; the result is checked against the source.

    Parameters
    ----------
    file
        A .safetensors adapter: peft, LyCORIS or kohya.
    to
        The program that is to read it.
    output
        File to write; default: beside the source, with the program's name at the end.
    family
        Model family, where the file's header does not state it.
    overwrite
        Replace the output if it is there.
    """
    words = ["export", str(file), "--to", to]
    words += ["--output", str(output)] if output else []
    words += ["--family", family] if family else []
    words += ["--overwrite"] if overwrite else []
    written = _ask(*words)
    print(f"{written['file']}: {written['modules']} modules, as {to} reads them")
    return 0


def _ask(*words: str) -> dict[str, Any]:
    """Reading tensors belongs to the training world: it is asked through its process, not imported."""
    ran = subprocess.run([sys.executable, "-m", ADAPTERS, *words], capture_output=True, text=True, check=False)
    if not ran.stdout.strip():
        # Libraries warn on stderr while they are imported; what they say matters only where no answer came.
        sys.stderr.write(ran.stderr)
        sys.exit(ran.returncode or ExitCode.BUG)
    answer: dict[str, Any] = json_text.loads(ran.stdout)
    if "problems" not in answer:
        return answer
    problems = [Problem(**row) for row in answer["problems"]]
    first = problems[0]
    raise UserError(
        first.code,
        first.message,
        hint=first.hint,
        exit_code=ExitCode(ran.returncode),
        problems=problems if len(problems) > 1 else (),
    )


def _joined(values: list[Any]) -> str:
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values) or "none"
