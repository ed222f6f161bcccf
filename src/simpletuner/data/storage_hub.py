"""A dataset of a Hugging Face hub: parquet files with pictures in them, or pictures as files. training.md §3.2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

from simpletuner.config.dataset_options import PictureDataset
from simpletuner.config.picture_files import picture_extensions
from simpletuner.data.captions import effective_strategy
from simpletuner.data.hub_parquet import ParquetPictures, Shard
from simpletuner.data.hub_repository import HubRepository, RepositoryFile
from simpletuner.data.storage import FileStat
from simpletuner.data.table import check_columns, read_csv, read_json_lines, read_parquet, variants_of
from simpletuner.errors import ExitCode, UserError
from simpletuner.retry import Retry

_FETCHERS = 4
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FILE_NAME = "file_name"
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
"""What folders and files are called → the split that they hold, as the library `datasets` has it."""


class HubBackend:
    def __init__(self, dataset: PictureDataset, cache_dir: Path, retry: Retry | None = None) -> None:
        self._dataset = dataset
        self._cache_dir = cache_dir
        self._repository = HubRepository(dataset, cache_dir, retry)
        self._has_captions = effective_strategy(dataset) == "huggingface"
        self._pictures: ParquetPictures | None = None
        self._captions: dict[str, tuple[str, ...]] = {}
        self._commit: str | None = None

    @property
    def identity(self) -> str:
        """Without the revision: a picture that two commits share is looked at once."""
        keys = self._dataset
        return f"hub {keys.dataset_name} {keys.split} {keys.image_column}"

    @property
    def revision(self) -> str | None:
        return self._commit

    def list(self) -> list[FileStat]:
        """Raises UserError `storage_missing` for a split that is not there, `caption_table_column` for a column."""
        self._commit, files = self._repository.resolve()
        shards = [file for file in files if file.path.endswith(".parquet") and not file.path.endswith(_TABLES)]
        found = list(self._list_rows(shards) if shards else self._list_files(files))
        return sorted(found, key=lambda file: file.path.encode(errors="surrogateescape"))

    def open(self, path: str) -> IO[bytes]:
        return self._repository.fetch(path).open("rb") if self._pictures is None else BytesIO(self.read(path))

    def read(self, path: str) -> bytes:
        return self._repository.fetch(path).read_bytes() if self._pictures is None else self._pictures.read(path)

    def captions(self, path: str) -> tuple[str, ...]:
        return self._captions.get(path, ()) if self._pictures is None else self._pictures.captions(path)

    def _list_rows(self, files: Sequence[RepositoryFile]) -> Iterator[FileStat]:
        wanted = sorted(self._of_split(files))
        folders = sorted({str(PurePosixPath(file.path).parent) for file in wanted})
        if len(folders) > 1:
            message = f"{self._repository.name} has several subsets with this split: {', '.join(folders)}."
            hint = "Only datasets with one subset are supported: bring the files of one to disk and use type local."
            raise self._repository.missing(message, hint, "dataset_name")
        with ThreadPoolExecutor(_FETCHERS, "hub") as pool:
            paths = list(pool.map(self._repository.fetch, [file.path for file in wanted]))
        shards = [Shard(path, file.path, file.version) for path, file in zip(paths, wanted, strict=True)]
        column = self._dataset.caption_column if self._has_captions else None
        self._pictures = ParquetPictures(shards, self._dataset.image_column, column, self._dataset.split)
        yield from self._pictures.list(self._cache_dir)

    def _list_files(self, files: Sequence[RepositoryFile]) -> Iterator[FileStat]:
        extensions = picture_extensions()
        pictures = [file for file in files if PurePosixPath(file.path).suffix.lower() in extensions]
        if not pictures:
            message = f"{self._repository.name} has neither parquet files nor pictures."
            hint = "Archives and loading scripts are not supported; the branch refs/convert/parquet may have parquet."
            raise self._repository.missing(message, hint, "dataset_name")
        self._of_split(pictures)
        wanted = [file for file in files if _is_in(file.path, self._dataset.split)]
        if self._has_captions:
            self._read_tables([file for file in wanted if PurePosixPath(file.path).name in _TABLES])
        for file in wanted:
            if not any(part.startswith(".") for part in file.path.split("/")):
                yield FileStat(file.path, file.num_bytes, version=file.version)

    def _of_split(self, files: Sequence[RepositoryFile]) -> Sequence[RepositoryFile]:
        split = self._dataset.split
        if found := [file for file in files if _is_in(file.path, split)]:
            return found
        known = sorted({split_of(file.path) for file in files})
        near = get_close_matches(split, known, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        message = f"{self._repository.name} has no split {split!r}."
        raise self._repository.missing(message, f"{guess}Its splits are: {', '.join(known)}.", "split")

    def _read_tables(self, files: Sequence[RepositoryFile]) -> None:
        if not files:
            raise UserError(
                "caption_table_unreadable",
                f"Dataset {self._dataset.id!r}: {self._repository.name} has pictures but no metadata.jsonl or .csv.",
                hint="Choose another `caption_strategy`: textfile or filename.",
                pointer="/caption_strategy",
                exit_code=ExitCode.DATA,
            )
        for file in files:
            rows = self._read_table(file)
            folder = PurePosixPath(file.path).parent
            for name, cell in zip(rows[_FILE_NAME], rows[self._dataset.caption_column], strict=True):
                self._captions[str(folder / str(name))] = variants_of(cell)

    def _read_table(self, file: RepositoryFile) -> dict[str, Sequence[Any]]:
        wanted = (_FILE_NAME, self._dataset.caption_column)
        try:
            with self._repository.fetch(file.path).open("rb") as opened:
                match PurePosixPath(file.path).suffix:
                    case ".jsonl":
                        rows = read_json_lines(opened, wanted)
                    case ".csv":
                        rows = read_csv(opened)
                    case _:
                        rows = read_parquet(opened)
        except (OSError, ValueError) as error:
            raise UserError(
                "caption_table_unreadable",
                f"{file.path} of {self._repository.name} cannot be read: {error}",
                hint="Choose another `caption_strategy` or `revision`.",
                exit_code=ExitCode.DATA,
            ) from error
        check_columns(file.path, rows, wanted)
        return {name: rows[name] for name in wanted}


def split_of(path: str) -> str:
    """By folder, and of a parquet file by its name; what says nothing is of the split `train`."""
    file = PurePosixPath(path)
    parts = [*file.parts[:-1]]
    if file.suffix == ".parquet":
        if shard := _SHARD.fullmatch(file.stem):
            return SPLITS.get(shard[1], shard[1])
        parts.append(file.stem)
    words = (word for part in parts for word in re.split(r"[._\- ]", part.lower()))
    return next((SPLITS[word] for word in words if word in SPLITS), "train")


def _is_in(path: str, split: str) -> bool:
    return split in path.split("/")[:-1] or split_of(path) == SPLITS.get(split, split)
