"""Pictures whose URLs stand in a CSV file. training.md §3.2."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from simpletuner.config.dataset_options import PictureDataset
from simpletuner.config.picture_files import picture_extensions
from simpletuner.data.captions import effective_strategy
from simpletuner.data.download import Downloader, Refused
from simpletuner.data.media import find_extension
from simpletuner.data.storage import FileStat, split_extension
from simpletuner.data.table import check_columns, read_csv, variants_of
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import write_atomic
from simpletuner.retry import Retry

_FETCHERS = 16


class _Fetched(NamedTuple):
    url: str
    file: Path
    failure: str
    """Empty where the file is there."""


class CsvBackend:
    """A picture is fetched once and kept under the hash of its URL; what failed is tried again at the next start.

    Paths are `<host>/<path>` of the URLs, so that they do not depend on the order of the lines.
    """

    def __init__(self, dataset: PictureDataset, retry: Retry | None = None) -> None:
        assert dataset.csv_file is not None
        assert dataset.csv_cache_dir is not None
        self._dataset = dataset
        self._csv = Path(dataset.csv_file)
        self._folder = Path(dataset.csv_cache_dir)
        self._retry = retry
        self._files: dict[str, Path] = {}
        self._captions: dict[str, tuple[str, ...]] = {}

    @property
    def identity(self) -> str:
        return f"csv {self._dataset.place}"

    @property
    def revision(self) -> None:
        return None

    def list(self) -> list[FileStat]:
        """Raises UserError `caption_table_unreadable` or `caption_table_column` (65)."""
        captions = self._read_lines()
        with Downloader(self._retry) as downloader, ThreadPoolExecutor(_FETCHERS, "csv") as pool:
            fetched = list(pool.map(partial(self._fetch, downloader), captions))
        self._files = {}
        found = list(self._name(fetched))
        self._captions = {
            path: tuple(dict.fromkeys(captions[row.url])) for row, (path, _) in zip(fetched, found, strict=True)
        }
        return sorted((stat for _, stat in found), key=lambda file: file.path.encode(errors="surrogateescape"))

    def open(self, path: str) -> IO[bytes]:
        return self._file(path).open("rb")

    def read(self, path: str) -> bytes:
        return self._file(path).read_bytes()

    def captions(self, path: str) -> tuple[str, ...]:
        return self._captions.get(path, ())

    def _file(self, path: str) -> Path:
        if path not in self._files:
            raise FileNotFoundError(f"no URL of {self._csv} is called {path}")
        return self._files[path]

    def _read_lines(self) -> dict[str, list[str]]:
        """URL → its captions."""
        url_column, caption_column = self._dataset.csv_url_column, self._dataset.csv_caption_column
        has_captions = effective_strategy(self._dataset) == "csv"
        try:
            with self._csv.open("rb") as file:
                rows = read_csv(file)
        except (OSError, ValueError) as error:
            raise UserError(
                "caption_table_unreadable",
                f"Dataset {self._dataset.id!r}: the CSV file {self._csv} cannot be read: {error}",
                hint="Correct `csv_file`; it is UTF-8 with a header, and one picture a line.",
                pointer="/csv_file",
                exit_code=ExitCode.DATA,
            ) from error
        check_columns(str(self._csv), rows, [url_column, *([caption_column] if has_captions else [])])
        found: dict[str, list[str]] = {}
        captions = rows[caption_column] if has_captions else [None] * len(rows[url_column])
        for url, caption in zip(rows[url_column], captions, strict=True):
            found.setdefault(str(url or "").strip(), []).extend(variants_of(caption))
        return found

    def _fetch(self, downloader: Downloader, url: str) -> _Fetched:
        key = sha256(url.encode(errors="surrogateescape")).hexdigest()
        file = self._folder / key[:2] / key
        if file.exists():
            return _Fetched(url, file, "")
        if not url:
            return _Fetched(url, file, "a line has no URL")
        try:
            content = downloader.fetch(url)
        except Refused as error:
            return _Fetched(url, file, str(error))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content)
        return _Fetched(url, file, "")

    def _name(self, fetched: list[_Fetched]) -> Iterator[tuple[str, FileStat]]:
        """In the same order."""
        for row in fetched:
            path = _path_of(row)
            if path in self._files:
                path = _with_hash(path, row.url)
            self._files[path] = row.file
            if row.failure:
                yield path, FileStat(path, 0, defect=row.failure)
                continue
            stat = row.file.stat()
            defect = "" if split_extension(path)[1].lower() in picture_extensions() else "it is no picture"
            yield path, FileStat(path, stat.st_size, stat.st_mtime_ns, defect=defect)


def _path_of(row: _Fetched) -> str:
    """With the extension of a picture, where it is one."""
    try:
        parts = urlsplit(row.url)
    except ValueError:
        parts = SplitResult("", "", "", "", "")
    host = parts.netloc.rpartition("@")[2] or "no-host"
    path = f"{host}/{unquote(parts.path).strip('/') or 'picture'}"
    if parts.query or not row.url:
        path = _with_hash(path, row.url)
    if split_extension(path)[1].lower() in picture_extensions() or row.failure:
        return path
    with row.file.open("rb") as file:
        return path + find_extension(file)


def _with_hash(path: str, url: str) -> str:
    stem, extension = split_extension(path)
    return f"{stem}-{sha256(url.encode(errors='surrogateescape')).hexdigest()[:8]}{extension}"
