"""`python -m simpletuner.adapters inspect FILE | export FILE --to …`: for commands that load no torch.

Writes one JSON object to standard output: what was found or written, or `{"problems": […]}`, with the exit code.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from simpletuner.adapters.convert import WRITERS, convert
from simpletuner.adapters.file import AdapterFile, read_adapter
from simpletuner.adapters.names import FAMILIES
from simpletuner.adapters.readers import family_fits, keys_of, readers_of
from simpletuner.errors import ExitCode, Problem, UserError


def main(words: list[str]) -> ExitCode:
    asked = _parser().parse_args(words)
    try:
        answer = inspect(asked.file) if asked.command == "inspect" else export(asked)
    except UserError as error:
        found = error.problems or (Problem(code=error.code, message=error.message, hint=error.hint),)
        _write({"problems": [problem.as_dict() for problem in found]})
        return error.exit_code
    _write(answer)
    return ExitCode.DONE


def inspect(path: Path) -> dict[str, Any]:
    """What a file holds. `readers`: programs that take it whole, by the names of its family or of one that fits."""
    adapter = read_adapter(path)
    fits = family_fits(adapter)
    family = adapter.family if adapter.family in FAMILIES else next(iter(fits), None)
    return {
        "file": str(path),
        "kind": adapter.kind.value,
        "family": adapter.family,
        "fits": list(fits),
        "algorithms": list(adapter.algorithms),
        "rank": list(adapter.ranks),
        "alpha": list(adapter.alphas),
        "modules": len(adapter.modules),
        "dtype": list(adapter.dtypes),
        "bytes": adapter.num_bytes,
        "metadata": dict(adapter.metadata),
        "readers": list(readers_of(adapter, keys_of(path), family)) if family else [],
    }


def export(asked: argparse.Namespace) -> dict[str, Any]:
    """Convert a file; raises UserError, also `already_exists` and `adapter_family_unknown`."""
    source = read_adapter(asked.file, family=asked.family)
    target = asked.output or asked.file.with_name(f"{asked.file.stem}_{asked.to}.safetensors")
    if target.exists() and (not asked.overwrite or target.samefile(asked.file)):
        raise UserError("already_exists", f"{target} exists already.", hint="Give another --output, or --overwrite.")
    family = asked.family or _family(source)
    convert(source, asked.to, target, family)
    written = read_adapter(target)
    return {"file": str(target), "to": asked.to, "family": family, "modules": len(written.modules)}


def _family(source: AdapterFile) -> str:
    if source.family is None:
        raise UserError(
            "adapter_family_unknown",
            f"The header of {source.path.name} does not say which model family it is for.",
            hint=f"Give --family; its names fit: {', '.join(family_fits(source)) or 'none that is known'}.",
        )
    return source.family


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simpletuner.adapters")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("inspect").add_argument("file", type=Path)
    exporting = commands.add_parser("export")
    exporting.add_argument("file", type=Path)
    exporting.add_argument("--to", choices=WRITERS, required=True)
    exporting.add_argument("--output", type=Path)
    exporting.add_argument("--family")
    exporting.add_argument("--overwrite", action="store_true")
    return parser


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
