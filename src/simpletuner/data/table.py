"""Captions and sizes of many pictures in one parquet or JSONL file. training.md §3.1 `parquet`."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from simpletuner.config.dataset_options import ParquetColumns
from simpletuner.data.geometry import Size
from simpletuner.data.storage import split_extension
from simpletuner.errors import ExitCode, UserError


class CaptionTable:
    """Rows by file name: the path under the dataset's root, else the bare name."""

    def __init__(self, columns: ParquetColumns, rows: dict[str, list[Any]]) -> None:
        """`rows` are columns of equal length."""
        self._includes_extension = columns.identifier_includes_extension
        names = rows[columns.filename_column]
        self._row = {str(name): number for number, name in enumerate(names)}
        self._captions = rows[columns.caption_column]
        self._fallback = rows.get(columns.fallback_caption_column or "", [])
        self._widths = rows.get(columns.width_column or "", [])
        self._heights = rows.get(columns.height_column or "", [])

    def captions(self, path: str) -> tuple[str, ...]:
        """Variants; empty where the table has none."""
        row = self._find(path)
        if row is None:
            return ()
        return _variants(self._captions[row]) or (_variants(self._fallback[row]) if self._fallback else ())

    def size(self, path: str) -> Size | None:
        row = self._find(path)
        if row is None or not self._widths or not self._heights:
            return None
        width, height = self._widths[row], self._heights[row]
        return (int(width), int(height)) if width and height else None

    def _find(self, path: str) -> int | None:
        name = path if self._includes_extension else split_extension(path)[0]
        row = self._row.get(name)
        return row if row is not None else self._row.get(name.rpartition("/")[2])


def _variants(cell: Any) -> tuple[str, ...]:
    cells = cast("list[Any]", cell) if isinstance(cell, list) else [cell]
    return tuple(str(text).strip() for text in cells if text is not None and str(text).strip())


def read_table(columns: ParquetColumns, root: Path) -> CaptionTable:
    """Raises UserError `caption_table_unreadable` or `caption_table_column` (65)."""
    path = root / columns.path
    wanted = [columns.filename_column, columns.caption_column]
    wanted += [name for name in (columns.fallback_caption_column, columns.width_column, columns.height_column) if name]
    try:
        rows = _read_json_lines(path, wanted) if path.suffix.lower() in (".jsonl", ".json") else _read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(
            "caption_table_unreadable",
            f"The table {path} cannot be read: {error}",
            hint="Correct `parquet.path`; the file must be parquet, or JSONL with one object a line.",
            exit_code=ExitCode.DATA,
        ) from error
    for name in wanted:
        if name not in rows:
            raise UserError(
                "caption_table_column",
                f"The table {path} has no column {name!r}.",
                hint=f"Its columns are: {', '.join(rows)}.",
                exit_code=ExitCode.DATA,
            )
    return CaptionTable(columns, rows)


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    # Imported here: it takes 0.2 s, and few datasets need it. By name: it carries no types.
    parquet: Any = import_module("pyarrow.parquet")
    return parquet.read_table(path).to_pydict()


def _read_json_lines(path: Path, wanted: list[str]) -> dict[str, list[Any]]:
    with path.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file if line.strip()]
    names = {name for row in rows for name in row} if rows else set(wanted)
    return {name: [row.get(name) for row in rows] for name in sorted(names)}
