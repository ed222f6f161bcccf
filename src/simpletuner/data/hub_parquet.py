"""Pictures inside parquet files, as the library `datasets` writes them: a row is a file. Torch-free."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from importlib import import_module
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from simpletuner.config.picture_files import picture_extensions
from simpletuner.data.media import find_extension
from simpletuner.data.storage import FileStat, split_extension
from simpletuner.data.table import check_columns, variants_of
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import write_atomic

_GROUPS_HELD = 4
"""Row groups in memory at once; `datasets` writes 100 pictures into one."""


class Shard(NamedTuple):
    path: Path
    name: str
    """In the repository."""
    version: str


class _Place(NamedTuple):
    shard: int
    group: int
    row: int
    """In the row group."""


class ParquetPictures:
    """The rows of several shards in order, numbered through: `<folder>/000123.png`.

    A picture is looked at once for its size and format, which are remembered beside the scan. Pictures stay where they
    are: one is read by decoding its row group, of which the last few are held.
    """

    def __init__(self, shards: Sequence[Shard], column: str, caption_column: str | None, folder: str) -> None:
        """`caption_column`: None where captions come from elsewhere. Raises UserError (65) for a column that is not."""
        self._shards = shards
        self._column = column
        self._folder = folder
        self._places: dict[str, _Place] = {}
        self._captions: dict[str, tuple[str, ...]] = {}
        self._caption_column = caption_column
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = Lock()
        # By name: it carries no types.
        self._parquet: Any = import_module("pyarrow.parquet")
        for shard in shards:
            self._check(shard)

    def list(self, cache_dir: Path) -> Iterator[FileStat]:
        number = 0
        for index, shard in enumerate(self._shards):
            facts = self._facts(index, cache_dir)
            captions = self._read_captions(shard)
            for row, (place, (extension, num_bytes)) in enumerate(zip(self._rows(index), facts, strict=True)):
                path = f"{self._folder}/{number:06d}{extension}"
                number += 1
                self._places[path] = place
                if captions:
                    self._captions[path] = variants_of(captions[row])
                defect = "" if extension else f"the cell of {self._column!r} holds no picture"
                yield FileStat(path, num_bytes, version=f"{shard.version}-{row}", defect=defect)

    def read(self, path: str) -> bytes:
        """Raises OSError where there is no such row."""
        if path not in self._places:
            raise FileNotFoundError(f"there is no row {path}")
        shard, group, row = self._places[path]
        return _content(self._group(shard, group)[row].as_py())

    def captions(self, path: str) -> tuple[str, ...]:
        return self._captions.get(path, ())

    def _check(self, shard: Shard) -> None:
        try:
            schema = self._parquet.read_schema(shard.path)
        except (OSError, ValueError) as error:
            raise UserError(
                "caption_table_unreadable",
                f"{shard.name} cannot be read as parquet: {error}",
                hint="Choose another `revision`, or tell the dataset's owner.",
                exit_code=ExitCode.DATA,
            ) from error
        check_columns(shard.name, schema.names, [self._column, *filter(None, [self._caption_column])])
        kind = str(schema.field(self._column).type)
        if kind not in ("binary", "large_binary") and "bytes: " not in kind:
            raise UserError(
                "caption_table_column",
                f"The column {self._column!r} of {shard.name} holds {kind}, no pictures.",
                hint=f"Correct `image_column`. The columns are: {', '.join(schema.names)}.",
                pointer="/image_column",
                exit_code=ExitCode.DATA,
            )

    def _rows(self, shard: int) -> Iterator[_Place]:
        metadata = self._parquet.read_metadata(self._shards[shard].path)
        for group in range(metadata.num_row_groups):
            for row in range(metadata.row_group(group).num_rows):
                yield _Place(shard, group, row)

    def _facts(self, index: int, cache_dir: Path) -> Sequence[tuple[str, int]]:
        """(extension, bytes) of each row; no extension means no picture."""
        shard = self._shards[index]
        key = sha256(f"rows-1 {shard.version} {self._column}".encode()).hexdigest()
        memory = cache_dir / f"rows-{key[:16]}.json"
        try:
            return [(str(row[0]), int(row[1])) for row in json.loads(memory.read_bytes())]
        except (OSError, ValueError, TypeError, IndexError):
            facts = [_look(self._group(place.shard, place.group)[place.row].as_py()) for place in self._rows(index)]
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, json.dumps(facts).encode())
        return facts

    def _read_captions(self, shard: Shard) -> Sequence[Any]:
        if self._caption_column is None:
            return ()
        return self._parquet.read_table(shard.path, columns=[self._caption_column]).column(0).to_pylist()

    def _group(self, shard: int, group: int) -> Any:
        """The picture column of a row group."""
        with self._lock:
            key = (shard, group)
            if key not in self._groups:
                file = self._parquet.ParquetFile(self._shards[shard].path)
                self._groups[key] = file.read_row_group(group, columns=[self._column]).column(0)
                while len(self._groups) > _GROUPS_HELD:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


def _content(cell: Any) -> bytes:
    """The bytes of a cell: the struct {bytes, path} of `datasets`, or bytes alone; empty where there are none."""
    return (cell.get("bytes") if isinstance(cell, dict) else cell) or b""


def _look(cell: Any) -> tuple[str, int]:
    content = _content(cell)
    name = cell.get("path") if isinstance(cell, dict) else None
    extension = split_extension(str(name or ""))[1].lower()
    if not content or extension in picture_extensions():
        return extension if content else "", len(content)
    return find_extension(BytesIO(content)), len(content)
