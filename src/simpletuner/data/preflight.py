"""`python -m simpletuner.data.preflight`: discovery alone, for commands and servers that load no torch.

Reads `{"datasets": […], "pointers": […], "alignment": n, "ignore_missing_files": false}` from standard input; writes
JSON lines: a row per file, then per dataset `{"summary": …}`, then `{"problem": …}` for what a run would say. The exit
code is that of a run that would end there: 65, or 69 for a storage that cannot be had.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpletuner.config.dataset_options import MODELS, PictureDataset, dataset_kind
from simpletuner.data.ledger import check_defects, dataset_report, ledger_row
from simpletuner.data.manifest import Manifest, discover
from simpletuner.data.pairs import pair_all, targets_of
from simpletuner.errors import ExitCode, Problem, UserError


def main() -> ExitCode:
    request: dict[str, Any] = json.load(sys.stdin)
    entries = [_entry(row) for row in request["datasets"]]
    try:
        manifests = discover_all(entries, request["alignment"], request["pointers"])
        for manifest in manifests:
            for row in range(len(manifest)):
                _write({"dataset": manifest.dataset.id, **ledger_row(manifest, row)})
        for manifest in manifests:
            _write({"summary": dataset_report(manifest)})
        problems = check_defects(targets_of(manifests), ignore_missing_files=request["ignore_missing_files"])
    except UserError as error:
        found = list(error.problems) or [
            Problem(code=error.code, message=error.message, hint=error.hint, pointer=error.pointer)
        ]
        _write_problems(found)
        return error.exit_code
    _write_problems(problems)
    return ExitCode.DONE


def discover_all(entries: Sequence[PictureDataset], alignment: int, pointers: Sequence[str]) -> list[Manifest]:
    """Paired, with the scans that a run keeps and takes up. Raises UserError (65)."""
    return pair_all(
        [
            discover(entry, alignment=alignment, cache_dir=Path(entry.cache_dir_vae) / "scan", pointer=pointer)
            for entry, pointer in zip(entries, pointers, strict=True)
        ]
    )


def _entry(row: dict[str, Any]) -> PictureDataset:
    entry = MODELS[dataset_kind(row)].model_validate(row)
    if not isinstance(entry, PictureDataset):
        raise TypeError(f"{row['id']} holds no pictures")
    return entry


def _write_problems(problems: list[Problem]) -> None:
    for problem in problems:
        _write({"problem": {"level": problem.level.value, **problem.as_dict()}})


def _write(row: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
