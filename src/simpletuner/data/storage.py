"""Where the files of a dataset are: one protocol, and local folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from simpletuner.errors import ExitCode, UserError
from simpletuner.job import write_atomic


class FileStat(NamedTuple):
    path: str
    """Relative to the root of the backend, with `/`."""
    num_bytes: int
    mtime_ns: int


class DataBackend(Protocol):
    """Files under a root, named by relative path. All methods raise OSError where the storage fails."""

    @property
    def root(self) -> str: ...
    def list(self) -> list[FileStat]:
        """All files, in bytewise order of their paths."""
        ...

    def open(self, path: str) -> IO[bytes]:
        """For readers that need the first bytes only."""
        ...

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, content: bytes) -> None:
        """Atomic: a reader sees the old bytes or the new ones."""
        ...

    def stat(self, path: str) -> FileStat: ...
    def delete(self, path: str) -> None: ...


class LocalBackend:
    """A folder, searched recursively. Hidden files and folders are skipped, links followed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def root(self) -> str:
        return str(self._root)

    def list(self) -> list[FileStat]:
        """Raises UserError `dataset_folder_missing` or `dataset_folder_unreadable` (65)."""
        try:
            return sorted(_walk(str(self._root), "", ()), key=lambda file: os.fsencode(file.path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                "dataset_folder_missing",
                f"There is no folder {self._root}.",
                hint="Correct `instance_data_dir`; a relative path starts at the workspace.",
                exit_code=ExitCode.DATA,
            ) from error
        except PermissionError as error:
            raise UserError(
                "dataset_folder_unreadable",
                f"The folder {error.filename} may not be read.",
                hint="Give the account that trains read and execute permission on it.",
                exit_code=ExitCode.DATA,
            ) from error

    def open(self, path: str) -> IO[bytes]:
        return (self._root / path).open("rb")

    def read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        whole = self._root / path
        whole.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(whole, content)

    def stat(self, path: str) -> FileStat:
        stat = (self._root / path).stat()
        return FileStat(path, stat.st_size, stat.st_mtime_ns)

    def delete(self, path: str) -> None:
        (self._root / path).unlink()


def _walk(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[FileStat]:
    """`above` are the folders on the way down: a link to one of them would never end."""
    stat = os.stat(folder)  # noqa: PTH116 - a path object per file would double the time of a scan
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, here))
                continue
            try:
                file = entry.stat()
            except OSError:  # a dangling link is a file found, and later a defect
                yield FileStat(prefix + entry.name, 0, 0)
                continue
            yield FileStat(prefix + entry.name, file.st_size, file.st_mtime_ns)


def stem_of(path: str) -> str:
    """File name without folder and extension."""
    return split_extension(path.rpartition("/")[2])[0]


def split_extension(path: str) -> tuple[str, str]:
    """`a/b.c.png` → (`a/b.c`, `.png`)."""
    return os.path.splitext(path)  # noqa: PTH122 - called once a file
