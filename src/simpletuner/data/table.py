"""Captions and sizes of many pictures in one parquet or JSONL file. training.md §3.1 `parquet`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from simpletuner.config.dataset_options import ParquetColumns
from simpletuner.data.geometry import Size
from simpletuner.data.storage import DataBackend, split_extension
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
        return variants_of(self._captions[row]) or (variants_of(self._fallback[row]) if self._fallback else ())

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


def variants_of(cell: Any) -> tuple[str, ...]:
    """The captions in a cell: one, or a list of them."""
    cells = cast("list[Any]", cell) if isinstance(cell, list) else [cell]
    return tuple(str(text).strip() for text in cells if text is not None and str(text).strip())


def read_table(columns: ParquetColumns, backend: DataBackend) -> CaptionTable:
    """Raises UserError `caption_table_unreadable` or `caption_table_column` (65)."""
    path = columns.path
    wanted = [columns.filename_column, columns.caption_column]
    wanted += [name for name in (columns.fallback_caption_column, columns.width_column, columns.height_column) if name]
    is_json = PurePosixPath(path).suffix.lower() in (".jsonl", ".json")
    try:
        with Path(path).open("rb") if Path(path).is_absolute() else backend.open(path) as file:
            rows = read_json_lines(file, wanted) if is_json else read_parquet(file)
    except (OSError, ValueError) as error:
        raise UserError(
            "caption_table_unreadable",
            f"The table {path} cannot be read: {error}",
            hint="Correct `parquet.path`; the file must be parquet, or JSONL with one object a line.",
            exit_code=ExitCode.DATA,
        ) from error
    check_columns(path, rows, wanted)
    return CaptionTable(columns, rows)


def check_columns(table: str, known: Iterable[str], wanted: Iterable[str]) -> None:
    """Raises UserError `caption_table_column` (65)."""
    names = list(known)
    for name in wanted:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            guess = f"Did you mean {near[0]!r}? " if near else ""
            raise UserError(
                "caption_table_column",
                f"The table {table} has no column {name!r}.",
                hint=f"{guess}Its columns are: {', '.join(names)}.",
                exit_code=ExitCode.DATA,
            )


def read_parquet(file: IO[bytes]) -> dict[str, list[Any]]:
    """All columns. Raises OSError or ValueError."""
    # Imported here: it takes 0.2 s, and few datasets need it. By name: it carries no types.
    parquet: Any = import_module("pyarrow.parquet")
    return parquet.read_table(file).to_pydict()


def read_json_lines(file: IO[bytes], wanted: Iterable[str]) -> dict[str, list[Any]]:
    """Columns of one object a line; without any line those `wanted`, empty."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in file if line.strip()]
    names = {name for row in rows for name in row} if rows else set(wanted)
    return {name: [row.get(name) for row in rows] for name in sorted(names)}


def read_csv(file: IO[bytes]) -> dict[str, list[Any]]:
    """Columns of a table with a header; a cell left out is None. Raises ValueError, for other than UTF-8."""
    reader = csv.DictReader(TextIOWrapper(file, encoding="utf-8-sig", newline=""))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    return {name: [row[name] for row in rows] for name in reader.fieldnames or ()}
