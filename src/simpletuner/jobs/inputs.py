"""What a job on a worker needs from this machine, by content: pictures, models, adapters, caches, its checkpoint.

In what a worker is told, a path of this machine is a placeholder (`simpletuner:dataset-0`); the worker puts its own in.
Buckets and hubs it reads by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simpletuner.checkpoints import BEST, hash_file, list_checkpoints
from simpletuner.job import JobDir, write_atomic

PLACEHOLDER = "simpletuner:"
OUTPUT = "output"
RECORD = "inputs.json"
_CACHES = ("cache_dir_vae", "cache_dir", "csv_cache_dir")
_CACHE_OPTIONS = ("cache_dir", "cache_dir_text", "cache_dir_vae")

Kind = Literal["tree", "file", "cache", "output"]


@dataclass(frozen=True, slots=True)
class Place:
    """A path of this machine that the job uses. Of a `cache` the worker has its own, and takes ours to begin with."""

    name: str
    kind: Kind
    path: Path


@dataclass(frozen=True, slots=True)
class Told:
    """A frozen job as a worker is told of it, and the places that its placeholders stand for."""

    config: dict[str, Any]
    datasets: list[Any]
    places: tuple[Place, ...]


def tell(config: Mapping[str, Any], datasets: Sequence[Any]) -> Told:
    """Pure but for looking which paths exist. `config` and `datasets` as they are frozen for a job."""
    finder = _Finder()
    told = dict(config)
    told["output_dir"] = finder.placeholder(OUTPUT, "output", config["output_dir"])
    for option in _CACHE_OPTIONS:
        if told.get(option):
            told[option] = finder.cache(told[option])
    model = Path(told["pretrained_model_name_or_path"])
    if model.is_absolute() and model.is_dir():
        told["pretrained_model_name_or_path"] = finder.placeholder("model", "tree", str(model))
    if told.get("init_lora"):
        kind = "tree" if Path(told["init_lora"]).is_dir() else "file"
        told["init_lora"] = finder.placeholder("init-lora", kind, told["init_lora"])
    resume = told.get("resume_from_checkpoint")
    if resume is not None and "/" in resume:
        inside = Path(resume).parent == Path(config["output_dir"])
        told["resume_from_checkpoint"] = Path(resume).name if inside else finder.placeholder("resume", "tree", resume)
    entries = [finder.dataset(index, dict(entry)) for index, entry in enumerate(datasets)]
    return Told(told, entries, tuple(finder.places))


class _Finder:
    def __init__(self) -> None:
        self.places: list[Place] = []

    def placeholder(self, name: str, kind: Kind, path: str) -> str:
        if all(place.name != name for place in self.places):
            self.places.append(Place(name, kind, Path(path)))
        return f"{PLACEHOLDER}{name}"

    def cache(self, path: str) -> str:
        """The same path is the same cache on the worker, for other jobs too."""
        name = hashlib.sha256(path.encode()).hexdigest()[:16]
        return self.placeholder(f"cache-{name}", "cache", path)

    def dataset(self, index: int, entry: dict[str, Any]) -> dict[str, Any]:
        if entry.get("instance_data_dir"):
            entry["instance_data_dir"] = self.placeholder(f"dataset-{index}", "tree", entry["instance_data_dir"])
        if entry.get("csv_file"):
            entry["csv_file"] = self.placeholder(f"csv-{index}", "file", entry["csv_file"])
        table = entry.get("parquet")
        if table and Path(table["path"]).is_absolute():
            entry["parquet"] = table | {"path": self.placeholder(f"table-{index}", "file", table["path"])}
        for key in _CACHES:
            if entry.get(key):
                entry[key] = self.cache(entry[key])
        return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """`path` is relative to its place, and empty for a place that is a file."""

    path: str
    bytes: int
    sha256: str
    mtime_ns: int


@dataclass(slots=True)
class Progress:
    """Of hashing, in bytes."""

    done: int = 0
    total: int = 0


class InputIndex:
    """Lists and hashes the places of one job; what did not change since is not read again."""

    def __init__(self, job: JobDir, places: Sequence[Place], resume: str | None) -> None:
        """`resume`: as `resume_of`."""
        self._record = job.root / RECORD
        self._places = [place for place in places if place.kind != "output" or resume is not None]
        self._resume = resume or ""
        self.progress = Progress()

    def build(self) -> dict[str, list[InputFile]]:
        """By place. Raises OSError for what cannot be read."""
        known = self._read_record()
        listed = {place.name: list(_list(place, self._resume)) for place in self._places}
        self.progress.total = sum(path.stat().st_size for found in listed.values() for _, path in found)
        built: dict[str, list[InputFile]] = {}
        for place in self._places:
            before = known.get(place.name, {})
            built[place.name] = [self._look(shown, path, before.get(shown)) for shown, path in listed[place.name]]
        rows = {name: [_as_row(file) for file in files] for name, files in built.items()}
        write_atomic(self._record, json.dumps(rows).encode())
        return built

    def _look(self, shown: str, path: Path, before: InputFile | None) -> InputFile:
        stat = path.stat()
        self.progress.done += stat.st_size
        if before is not None and (before.bytes, before.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return before
        return InputFile(path=shown, bytes=stat.st_size, sha256=hash_file(path), mtime_ns=stat.st_mtime_ns)

    def _read_record(self) -> dict[str, dict[str, InputFile]]:
        try:
            rows: dict[str, list[list[Any]]] = json.loads(self._record.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return {name: {row[0]: _from_row(row) for row in found} for name, found in rows.items()}


def locate(places: Sequence[Place], name: str, path: str) -> Path | None:
    """A file of a place; None for what is not in it, however it is spelled."""
    place = next((place for place in places if place.name == name), None)
    if place is None:
        return None
    if place.kind == "file":
        return place.path if not path else None
    parts = Path(path).parts
    if not parts or Path(path).is_absolute() or ".." in parts:
        return None
    found = place.path.joinpath(*parts)
    return found if found.is_file() else None


def resume_of(config: Mapping[str, Any], *, continues: bool) -> str | None:
    """The checkpoint of the output folder that the job begins with: its name, `latest`, or None for none."""
    asked: str | None = config.get("resume_from_checkpoint")
    if continues or asked is None:
        return "latest" if continues else None
    return Path(asked).name


def _list(place: Place, resume: str) -> Iterator[tuple[str, Path]]:
    """In order of name. A dataset may hold links, which are followed, as the trainer follows them."""
    if place.kind == "file":
        yield "", place.path
    elif place.kind == "output":
        yield from _list_output(place.path, resume)
    else:
        yield from _walk(place.path, place.path)


def _walk(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if path.is_file():
                yield str(path.relative_to(root)), path


def _list_output(output_dir: Path, resume: str) -> Iterator[tuple[str, Path]]:
    """The files beside the checkpoints; of those the newest complete one, the best one, and `resume`."""
    complete = [folder.name for folder in list_checkpoints(output_dir) if folder.manifest is not None]
    if not complete:
        return
    yield from ((path.name, path) for path in sorted(output_dir.iterdir()) if path.is_file())
    best = (output_dir / BEST).resolve().name
    for name in complete:
        if name in {complete[0], best, resume}:
            yield from _walk(output_dir, output_dir / name)


def _as_row(file: InputFile) -> list[Any]:
    return [file.path, file.bytes, file.sha256, file.mtime_ns]


def _from_row(row: Sequence[Any]) -> InputFile:
    return InputFile(path=row[0], bytes=row[1], sha256=row[2], mtime_ns=row[3])
