"""A content-addressed store of tensors: what an encoder made, under the hash of all that decided it. training.md §3.8.

On disk a *shard* is a safetensors file plus an index that is written after it: a shard without an index does not exist
yet. Nothing is ever appended to a file, and every name is unique, so that any number of processes may fill one cache.

    shard-<random>.safetensors    tensors named <key>/<name>
    shard-<random>.index          line 1: bytes and mtime of the shard, then its keys; line 2: JSON, its tensors
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple
from zlib import crc32

import torch
from safetensors.torch import save
from torch import Tensor

from simpletuner.job import write_atomic

FORMAT = "1"
"""Part of every key: raising it makes all entries anew."""

_SHARD_BYTES = 64 << 20

Entry = dict[str, Tensor]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def cache_key(kind: str, fingerprint: str, transform: str, content: bytes) -> str:
    """64 hex digits. `content`: hash of a file's bytes, or the effective caption. No folder, dataset or order in it."""
    parts = (kind.encode(), FORMAT.encode(), fingerprint.encode(), transform.encode(), content)
    return sha256(b"\0".join(parts)).hexdigest()


class CorruptEntry(Exception):
    """The bytes of an entry are not those that were written. The store has forgotten it: it will be made anew."""

    def __init__(self, key: str, shard: str) -> None:
        super().__init__(f"entry {key} of {shard} is corrupt")
        self.key = key


class _Place(NamedTuple):
    """One tensor in a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    checksum: int


class _Shard:
    """A shard's index; its places are parsed and its file is mapped when first asked for."""

    def __init__(self, path: Path, num_bytes: int, mtime_ns: int, keys: Sequence[str], places: str) -> None:
        """`places`: JSON, for each key in order the fields of its `_Place`s."""
        self.path = path
        self.num_bytes = num_bytes
        self.mtime_ns = mtime_ns
        self.keys = tuple(keys)
        self._json = places
        self._parsed: dict[str, list[_Place]] = {}
        self._bytes: Tensor | None = None

    def is_as_written(self) -> bool:
        stat = self.path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.num_bytes, self.mtime_ns)

    def is_whole(self, key: str) -> bool:
        data: Any = self._map().numpy()
        return all(crc32(data[at.start : at.end]) == at.checksum for at in self._places()[key])

    def read(self, key: str) -> Entry:
        data = self._map()
        return {at.name: data[at.start : at.end].view(_DTYPES[at.dtype]).view(at.shape) for at in self._places()[key]}

    def forget(self, keys: set[str]) -> None:
        """Leave entries out of the index, also on disk, so that any later start makes them anew."""
        places = self._places()
        self.keys = tuple(key for key in self.keys if key not in keys)
        self._parsed = {key: places[key] for key in self.keys}
        self.mtime_ns = self.path.stat().st_mtime_ns
        self.write_index()

    def write_index(self) -> None:
        places = json.dumps([self._places()[key] for key in self.keys], separators=(",", ":"))
        head = f"{self.num_bytes} {self.mtime_ns} {' '.join(self.keys)}"
        write_atomic(index_path(self.path), f"{head}\n{places}\n".encode())

    def _places(self) -> dict[str, list[_Place]]:
        if self._json:
            rows: list[list[Any]] = json.loads(self._json)
            self._parsed = {
                key: [_Place(name, dtype, tuple(shape), *rest) for name, dtype, shape, *rest in row]
                for key, row in zip(self.keys, rows, strict=True)
            }
            self._json = ""
        return self._parsed

    def _map(self) -> Tensor:
        """The file's bytes. Mapped privately: a caller that writes to them never reaches the disk."""
        if self._bytes is None:
            storage: Any = torch.UntypedStorage
            mapped = storage.from_file(str(self.path), False, self.num_bytes)
            self._bytes = torch.tensor([], dtype=torch.uint8).set_(mapped)
        return self._bytes


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index")


class CacheStore:
    """Entries (named tensors) by key, under one folder. Threads may share a store."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.corrupt: set[str] = set()
        """Keys whose bytes were found changed since this store was opened."""
        self._shard_of: dict[str, _Shard] = {}
        self._seen: set[str] = set()
        self._checked: set[str] = set()
        self._lock = RLock()
        self._look_again()

    def __len__(self) -> int:
        return len(self._shard_of)

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The keys that are not here, in order, each once.

        Sees what other processes have written meanwhile. A shard whose file was touched since it was written is
        checked whole: its damaged entries are missing.
        """
        with self._lock:
            self._look_again()
            return [key for key in dict.fromkeys(keys) if key not in self._shard_of]

    def put(self, items: Mapping[str, Entry]) -> None:
        """Write entries; on return they are on disk. Raises OSError when it is full; then no part of them is here."""
        for part in _parts(items):
            shard = _write_shard(self.root, part)
            with self._lock:
                self._adopt(shard)
                self._checked.update(part)

    def get(self, keys: Sequence[str]) -> list[Entry]:
        """The entries, as views of the mapped file: nothing is copied.

        The first read of an entry compares its checksum. Raises KeyError, or CorruptEntry.
        """
        return [self._get(key) for key in keys]

    def _get(self, key: str) -> Entry:
        with self._lock:
            shard = self._shard_of.get(key)
            if shard is None:
                self._look_again()
                shard = self._shard_of[key]
            if key not in self._checked:
                if not shard.is_whole(key):
                    self._forget(shard, {key})
                    raise CorruptEntry(key, shard.path.name)
                self._checked.add(key)
            return shard.read(key)

    def _look_again(self) -> None:
        """Take up the shards that were committed since the last look."""
        with os.scandir(self.root) as entries:
            names = {entry.name for entry in entries if entry.name.endswith(".index")}
        for name in sorted(names - self._seen):
            self._seen.add(name)
            shard = _read_index(self.root / name)
            if shard is not None:
                self._adopt(shard)
                self._check_touched(shard)

    def _adopt(self, shard: _Shard) -> None:
        self._seen.add(index_path(shard.path).name)
        self._shard_of.update(dict.fromkeys(shard.keys, shard))

    def _check_touched(self, shard: _Shard) -> None:
        if shard.is_as_written():
            return
        damaged = {key for key in shard.keys if not shard.is_whole(key)}
        self._checked.update(set(shard.keys) - damaged)
        self._forget(shard, damaged)

    def _forget(self, shard: _Shard, damaged: set[str]) -> None:
        self.corrupt |= damaged
        for key in damaged:
            if self._shard_of.get(key) is shard:
                del self._shard_of[key]
        shard.forget(damaged)


def _parts(items: Mapping[str, Entry]) -> Iterator[dict[str, Entry]]:
    """Pieces of about the size of a shard."""
    part: dict[str, Entry] = {}
    num_bytes = 0
    for key, entry in items.items():
        part[key] = entry
        num_bytes += sum(tensor.nbytes for tensor in entry.values())
        if num_bytes >= _SHARD_BYTES:
            yield part
            part, num_bytes = {}, 0
    if part:
        yield part


def _write_shard(root: Path, items: Mapping[str, Entry]) -> _Shard:
    # Cloned, because safetensors refuses tensors that share memory, as the rows of an encoded batch do.
    content = save(
        {
            f"{key}/{name}": tensor.cpu().clone(memory_format=torch.contiguous_format)
            for key, entry in items.items()
            for name, tensor in entry.items()
        }
    )
    size = int.from_bytes(content[:8], "little") + 8
    header: dict[str, Any] = json.loads(content[8:size])
    view = memoryview(content)

    def place(key: str, name: str) -> _Place:
        told = header[f"{key}/{name}"]
        start, end = (size + offset for offset in told["data_offsets"])
        return _Place(name, told["dtype"], tuple(told["shape"]), start, end, crc32(view[start:end]))

    places = [[place(key, name) for name in entry] for key, entry in items.items()]
    path = root / f"shard-{secrets.token_hex(8)}.safetensors"
    write_atomic(path, content)
    shard = _Shard(path, len(content), path.stat().st_mtime_ns, list(items), json.dumps(places))
    shard.write_index()
    return shard


def _read_index(path: Path) -> _Shard | None:
    """None where the index is torn, or its shard is gone or cut short: such entries are missing."""
    try:
        with path.open(encoding="ascii") as file:
            num_bytes, mtime_ns, *keys = file.readline().split()
            places = file.readline()
        shard = _Shard(path.with_suffix(".safetensors"), int(num_bytes), int(mtime_ns), keys, places)
        is_here = shard.path.stat().st_size == shard.num_bytes
    except (OSError, ValueError):
        return None
    return shard if is_here and places.endswith("]\n") else None
