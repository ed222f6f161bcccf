"""Where the files of a dataset are: one protocol, and local folders. training.md §3.2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from simpletuner.errors import ExitCode, UserError


class FileStat(NamedTuple):
    path: str
    """Relative to the root of the backend, with `/`."""
    num_bytes: int
    mtime_ns: int = 0
    """0 where the storage keeps no such time."""
    version: str = ""
    """Changes with the content, where the storage names contents."""
    defect: str = ""
    """Why the file cannot be had although it is listed; it is not opened."""


class DataBackend(Protocol):
    """Files to read under a root, named by relative path.

    What is wrong with one file is an OSError. A storage that fails as a whole raises UserError: `storage_unavailable`
    or `storage_denied` (69), `storage_missing` (65).
    """

    @property
    def identity(self) -> str:
        """The same for the same place: what was learnt of its files is remembered under this name."""
        ...

    @property
    def revision(self) -> str | None:
        """The commit that the listed files are of, where the storage has commits."""
        ...

    def list(self) -> list[FileStat]:
        """All files, in bytewise order of their paths. Comes first: it may find out what the other methods need."""
        ...

    def open(self, path: str) -> IO[bytes]:
        """Seekable; fetches no more than is read, where the storage can give parts."""
        ...

    def read(self, path: str) -> bytes: ...
    def captions(self, path: str) -> tuple[str, ...]:
        """Variants from a column of the storage; none where it keeps files alone."""
        ...


class LocalBackend:
    """A folder, searched recursively. Hidden files and folders are skipped, links followed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def identity(self) -> str:
        return str(self._root)

    @property
    def revision(self) -> None:
        return None

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

    def captions(self, path: str) -> tuple[str, ...]:
        return ()


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
