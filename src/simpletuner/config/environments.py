"""Environments: folders under the configs directory that hold a configuration and its dataset file. api.md §2.3."""

from __future__ import annotations

import json
import re
import shutil
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from simpletuner.config.history import AUTHORS, BACKUPS, etag_of, note_author
from simpletuner.config.json_text import duplicate_problems, read_json
from simpletuner.config.lycoris import FILE as LYCORIS_FILE
from simpletuner.config.option import OptionField
from simpletuner.config.sources import Layer, layer_from_mapping
from simpletuner.errors import Level, Problem, UserError
from simpletuner.events import utc_now
from simpletuner.job import fsync_folder, write_atomic

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = frozenset(
    {"examples", "active", "schema", "environments", "import", "export", "webhooks", "data_backends", "templates"}
)
_BACKUPS_KEPT = 10
CONFIG_FILES = ("config.json", "config.toml", "config.env")


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """What `config.json` says: explicit values by dashed name, the findings about its text, and its ETag."""

    config: dict[str, Any]
    problems: tuple[Problem, ...]
    etag: str
    path: Path


class Environments:
    """The environments of one configs directory. Every write is atomic and leaves a backup."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(
            folder.name
            for folder in self.root.iterdir()
            if folder.is_dir()
            and folder.name not in _RESERVED
            and NAME.fullmatch(folder.name)
            and any((folder / name).exists() for name in CONFIG_FILES)
        )

    def folder(self, name: str) -> Path:
        """The folder of an existing environment. Raises UserError `unknown_config`."""
        name = name.removesuffix(".json")
        if name not in self.names():
            near = get_close_matches(name, self.names(), n=1)
            raise UserError(
                "unknown_config",
                f"There is no environment {name!r}.",
                hint=f"Did you mean {near[0]!r}?" if near else "",
            )
        return self.root / name

    def check_new_name(self, name: str, *, adhoc: bool = False) -> str:
        """The name without `.json`. Raises UserError `reserved_name`, `invalid_field` or `already_exists`."""
        name = name.removesuffix(".json")
        if not NAME.fullmatch(name):
            raise UserError(
                "invalid_field",
                f"{name!r} is not a name for an environment.",
                hint="Letters, digits, '.', '_' and '-'; at most 64, the first a letter or digit.",
                pointer="/name",
            )
        if name in _RESERVED or (name.startswith("adhoc-") and not adhoc):
            raise UserError("reserved_name", f"The name {name!r} is reserved.", pointer="/name")
        if (self.root / name).exists():
            raise UserError("already_exists", f"The environment {name!r} exists already.", pointer="/name")
        return name

    def create(
        self,
        name: str,
        config: Mapping[str, Any],
        metadata: Mapping[str, Any],
        datasets: list[Any] | None,
        lycoris: bytes | None = None,
    ) -> Path:
        """Write a whole new folder beside its place and rename it."""
        beside = self.root / f".{name}.{time.monotonic_ns()}.tmp"
        beside.mkdir(parents=True)
        write_atomic(beside / "config.json", to_json(dict(config)))
        if datasets is not None:
            write_atomic(beside / "multidatabackend.json", to_json(datasets))
        if lycoris is not None:
            write_atomic(beside / LYCORIS_FILE, lycoris)
        stamped = {"created_at": utc_now(), "modified_at": utc_now(), **metadata}
        write_atomic(beside / ".metadata.json", to_json(stamped))
        beside.rename(self.root / name)
        fsync_folder(self.root)
        return self.root / name

    def read(self, name: str) -> StoredConfig:
        """Raises UserError `unknown_config`, or `bad_json` and the like with the line."""
        folder = self.folder(name)
        path = next(folder / file for file in CONFIG_FILES if (folder / file).exists())
        content = path.read_bytes()
        shown = f"{name}/{path.name}"
        values, problems = _parse(content, path, shown)
        problems += [_twice(key) for key in values if f"--{key}" in values]
        dashed = {key if key.startswith(("--", "__")) else f"--{key}": value for key, value in values.items()}
        dashed |= {key: value for key, value in values.items() if key.startswith("--")}
        return StoredConfig(dashed, tuple(problems), etag_of(content), path)

    def layer(self, name: str, known: Mapping[str, OptionField]) -> Layer:
        """The environment as a layer of option resolution."""
        stored = self.read(name)
        is_text = stored.path.suffix == ".env"
        layer = layer_from_mapping(stored.config, name=f"environment:{name}", known=known, is_text=is_text)
        return Layer(layer.name, layer.values, (*stored.problems, *layer.problems), is_text)

    def write(
        self, name: str, config: Mapping[str, Any], *, if_match: str | None = None, author: str | None = None
    ) -> str:
        """Replace the configuration whole; returns the new ETag. Raises UserError `etag_mismatch`."""
        stored = self.read(name)
        check_etag(if_match, stored.etag)
        content = to_json(dict(config))
        if content != stored.path.read_bytes():
            target = stored.path.with_name("config.json")
            self._back_up(stored.path)
            write_atomic(target, content)
            note_author(target.parent, content, author)
            if stored.path != target:
                stored.path.unlink()
            self.write_metadata(name, {"modified_at": utc_now()})
        return etag_of(content)

    def read_metadata(self, name: str) -> dict[str, Any]:
        try:
            notes: object = json.loads((self.folder(name) / ".metadata.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return cast(dict[str, Any], notes) if isinstance(notes, dict) else {}

    def write_metadata(self, name: str, changes: Mapping[str, Any]) -> None:
        merged = self.read_metadata(name) | dict(changes)
        write_atomic(self.folder(name) / ".metadata.json", to_json(merged))

    def dataloader_path(self, name: str) -> Path:
        return self.folder(name) / "multidatabackend.json"

    def lycoris_path(self, name: str) -> Path:
        return self.folder(name) / LYCORIS_FILE

    def read_dataloader(self, name: str) -> tuple[Any, list[Problem], str]:
        """`(content, problems, etag)`. Raises UserError `not_found` when the environment has none."""
        return self._read(name, self.dataloader_path(name), "dataset file")

    def read_lycoris(self, name: str) -> tuple[Any, list[Problem], str]:
        """The same of the LyCORIS configuration."""
        return self._read(name, self.lycoris_path(name), "LyCORIS configuration")

    def _read(self, name: str, path: Path, what: str) -> tuple[Any, list[Problem], str]:
        if not path.exists():
            raise UserError("not_found", f"The environment {name!r} has no {what}.")
        content, shown = path.read_bytes(), f"{name}/{path.name}"
        try:
            value, duplicates = read_json(content.decode(), name=shown)
        except UnicodeDecodeError as error:
            raise UserError("bad_json", f"{shown} is not UTF-8 text.") from error
        return value, duplicate_problems(duplicates, name=path.name), etag_of(content)

    def write_dataloader(
        self, name: str, datasets: list[Any], *, if_match: str | None = None, author: str | None = None
    ) -> tuple[str, Path | None]:
        """`(etag, backup)`."""
        return self._write(self.dataloader_path(name), datasets, if_match, author)

    def write_lycoris(
        self, name: str, config: dict[str, Any], *, if_match: str | None = None, author: str | None = None
    ) -> tuple[str, Path | None]:
        """`(etag, backup)`."""
        return self._write(self.lycoris_path(name), config, if_match, author)

    def _write(self, path: Path, value: Any, if_match: str | None, author: str | None) -> tuple[str, Path | None]:
        if path.exists():
            check_etag(if_match, etag_of(path.read_bytes()))
        backup = self._back_up(path)
        content = to_json(value)
        write_atomic(path, content)
        note_author(path.parent, content, author)
        return etag_of(content), backup

    def delete(self, name: str) -> None:
        """Move the folder to the trash."""
        folder = self.folder(name)
        trash = self.root / ".trash"
        trash.mkdir(exist_ok=True)
        folder.rename(trash / f"{folder.name}.{time.time_ns()}")

    def rename(self, name: str, new_name: str) -> Path:
        """Paths inside that begin with the old name follow."""
        folder, new_name = self.folder(name), self.check_new_name(new_name)
        folder.rename(self.root / new_name)
        self._follow(folder.name, new_name)
        return self.root / new_name

    def copy(self, name: str, target: str, *, owner: str) -> Path:
        """It belongs to `owner`."""
        folder, target = self.folder(name), self.check_new_name(target)
        beside = self.root / f".{target}.{time.monotonic_ns()}.tmp"
        shutil.copytree(folder, beside, ignore=shutil.ignore_patterns(BACKUPS, AUTHORS))
        notes = self.read_metadata(name) | {"created_at": utc_now(), "modified_at": utc_now(), "owner": owner}
        write_atomic(beside / ".metadata.json", to_json(notes))
        beside.rename(self.root / target)
        self._follow(folder.name, target)
        return self.root / target

    def _follow(self, old: str, new: str) -> None:
        config = self.read(new).config
        moved = {
            key: f"{new}/{value.removeprefix(f'{old}/')}"
            if isinstance(value, str) and value.startswith(f"{old}/")
            else value
            for key, value in config.items()
        }
        if moved != config:
            self.write(new, moved)

    def _back_up(self, path: Path) -> Path | None:
        if not path.exists():
            return None
        folder = path.parent / BACKUPS
        folder.mkdir(exist_ok=True)
        backup = folder / f"{path.name}.{time.time_ns()}"
        shutil.copy2(path, backup)
        for old in sorted(folder.glob(f"{path.name}.*"))[:-_BACKUPS_KEPT]:
            old.unlink()
        return backup


def check_etag(wanted: str | None, current: str) -> None:
    if wanted not in (None, "*", current):
        raise UserError(
            "etag_mismatch", "The file has changed since it was read.", hint="Read it again and repeat the change."
        )


def to_json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _parse(content: bytes, path: Path, shown: str) -> tuple[dict[str, Any], list[Problem]]:
    try:
        text = content.decode()
        if path.suffix == ".toml":
            return tomllib.loads(text), []
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError("bad_config_file", f"{shown} cannot be read: {error}.") from error
    if path.suffix == ".env":
        return _parse_env(text, shown)
    value, duplicates = read_json(text, name=shown)
    if not isinstance(value, dict):
        raise UserError("bad_config_file", f"{shown} holds no object.", hint='Write { "--option": value, … }.')
    return cast(dict[str, Any], value), duplicate_problems(duplicates, name=shown)


def _parse_env(text: str, shown: str) -> tuple[dict[str, Any], list[Problem]]:
    """`NAME=value` lines; names in upper case are options too. The last of a repeated name wins, with a warning."""
    pairs: dict[str, Any] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("export ")
        if not line or line.startswith("#"):
            continue
        key, _, value = line.partition("=")
        key = key.strip().lower()
        if key in pairs:
            message = f"{shown}, line {number}: {key!r} is given before; this line wins."
            problems.append(
                Problem(
                    code="duplicate_key",
                    message=message,
                    hint="Remove the earlier one.",
                    pointer=f"/{key}",
                    level=Level.WARNING,
                )
            )
        pairs[key] = value.strip().strip("'\"")
    return pairs, problems


def _twice(key: str) -> Problem:
    return Problem(
        code="duplicate_option",
        option=key,
        message=f"--{key} and {key} are both given; --{key} is used.",
        pointer=f"/--{key}",
        level=Level.WARNING,
    )
