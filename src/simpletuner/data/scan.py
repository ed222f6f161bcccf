"""What a dataset's files are, remembered: an unchanged file is not opened again. Torch-free.

A file is unchanged if its path, size, modification time and version are. The memory is one file per place in the cache
folder, replaced whole; two jobs that scan at once each write a true one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import file_digest, sha256
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from simpletuner.data.geometry import Size
from simpletuner.data.media import UnreadablePicture, read_size
from simpletuner.data.storage import DataBackend, FileStat
from simpletuner.job import write_atomic

_VERSION = "scan-2"
_WORKERS = 8
_CHUNK = 32
T = TypeVar("T")


@dataclass(slots=True)
class _Facts:
    """What opening one file told; what was not asked for is None."""

    num_bytes: int
    mtime_ns: int
    version: str
    size: Size | None = None
    content: bytes | None = None
    text: str | None = None


class Scan:
    """The files of one backend with their facts, each learnt once."""

    def __init__(self, backend: DataBackend, cache_dir: Path) -> None:
        self.files = backend.list()
        self._backend = backend
        self._stat = {file.path: file for file in self.files}
        place = sha256(backend.identity.encode(errors="surrogateescape")).hexdigest()
        self._path = cache_dir / f"scan-{place[:16]}.jsonl"
        self._facts = _read_facts(self._path, self._stat)
        self._is_changed = False

    @property
    def names(self) -> Mapping[str, FileStat]:
        return self._stat

    def sizes(self, files: Sequence[FileStat]) -> list[Size | UnreadablePicture]:
        """Upright sizes from the headers, or what is wrong with a file."""
        return self._learn(files, self._size)

    def contents(self, files: Sequence[FileStat]) -> list[bytes | UnreadablePicture]:
        """SHA-256 of the bytes of each file, or what is wrong with it."""
        return self._learn(files, self._content)

    def text(self, path: str) -> bytes:
        """The bytes of a caption file. Raises OSError."""
        facts = self._of(self._stat[path])
        if facts.text is not None:
            return facts.text.encode()
        content = self._backend.read(path)
        try:
            facts.text = content.decode()
        except UnicodeDecodeError:
            return content  # a defect: read again until it is mended
        self._is_changed = True
        return content

    def remember(self) -> None:
        """Write down what was learnt, if anything was."""
        if not self._is_changed:
            return
        lines = [json.dumps(_VERSION)]
        for path, facts in self._facts.items():
            content = facts.content.hex() if facts.content else None
            known = (facts.num_bytes, facts.mtime_ns, facts.version)
            lines.append(json.dumps([path, *known, facts.size, content, facts.text]))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, ("\n".join(lines) + "\n").encode())
        self._is_changed = False

    def _of(self, file: FileStat) -> _Facts:
        return self._facts.setdefault(file.path, _Facts(file.num_bytes, file.mtime_ns, file.version))

    def _size(self, file: FileStat) -> Size | UnreadablePicture:
        facts = self._of(file)
        if facts.size is None:
            try:
                with self._backend.open(file.path) as opened:
                    facts.size = read_size(opened)
            except (OSError, UnreadablePicture) as error:
                return error if isinstance(error, UnreadablePicture) else UnreadablePicture(str(error))
            self._is_changed = True
        return facts.size

    def _content(self, file: FileStat) -> bytes | UnreadablePicture:
        facts = self._of(file)
        if facts.content is None:
            try:
                with self._backend.open(file.path) as opened:
                    facts.content = file_digest(opened, "sha256").digest()  # pyright: ignore[reportArgumentType]
            except OSError as error:
                return UnreadablePicture(str(error))
            self._is_changed = True
        return facts.content

    def _learn(self, files: Sequence[FileStat], learn: Callable[[FileStat], T]) -> list[T]:
        """Threads hide the latency of storage; chunks keep their overhead off local disks."""

        def learn_chunk(start: int) -> list[T]:
            return [learn(file) for file in files[start : start + _CHUNK]]

        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="scan") as pool:
            return list(chain.from_iterable(pool.map(learn_chunk, range(0, len(files), _CHUNK))))


def _read_facts(path: Path, stat: Mapping[str, FileStat]) -> dict[str, _Facts]:
    """The facts that still hold. A memory that cannot be read is none: it only saves work."""
    facts: dict[str, _Facts] = {}
    try:
        with path.open(encoding="utf-8") as file:
            if next(file, "") != json.dumps(_VERSION) + "\n":
                return {}
            for line in file:
                row: list[Any] = json.loads(line)
                known = stat.get(row[0])
                if known and [known.num_bytes, known.mtime_ns, known.version] == row[1:4]:
                    size = (row[4][0], row[4][1]) if row[4] else None
                    content = bytes.fromhex(row[5]) if row[5] else None
                    facts[row[0]] = _Facts(row[1], row[2], row[3], size, content, row[6])
    except (OSError, ValueError, IndexError, TypeError):
        return {}
    return facts
