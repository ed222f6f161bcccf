"""The key file: an API key for each server that somebody logged in at, for its owner's eyes only."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from simpletuner.cli.refusal import ClientExit, Refusal
from simpletuner.job import write_atomic

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class StoredKey(BaseModel):
    """`id` and `name` are the server's, `username` is whose key it is."""

    key: str
    id: int
    name: str
    username: str


_KEYS = TypeAdapter(dict[str, StoredKey])


class KeyFile:
    """Keys by the server's URL. Every method raises Refusal `bad_key_file` where the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> KeyFile:
        """`$XDG_CONFIG_HOME/simpletuner/keys.json`."""
        base = environ.get("XDG_CONFIG_HOME")
        folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".config"
        return cls(folder / "simpletuner" / "keys.json")

    def get(self, url: str) -> StoredKey | None:
        return self._read().get(url)

    def put(self, url: str, key: StoredKey) -> None:
        self._write(self._read() | {url: key})

    def drop(self, url: str) -> None:
        self._write({other: key for other, key in self._read().items() if other != url})

    def _read(self) -> dict[str, StoredKey]:
        try:
            with self.path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                content = file.read()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _unusable(f"{self.path} cannot be read: {error.strerror}.") from error
        if mode & _OTHERS:
            raise _unusable(f"{self.path} can be read by others (mode {mode:04o}).", f"chmod 600 {self.path}")
        try:
            return _KEYS.validate_json(content)
        except ValidationError as error:
            hint = f"Remove {self.path} and log in again."
            raise _unusable(f"{self.path} does not hold keys.", hint) from error

    def _write(self, keys: Mapping[str, StoredKey]) -> None:
        before = os.umask(_OTHERS)
        try:
            self.path.parent.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
            write_atomic(self.path, _KEYS.dump_json(dict(keys), indent=2) + b"\n")
        except OSError as error:
            raise _unusable(f"{self.path} cannot be written: {error.strerror}.") from error
        finally:
            os.umask(before)


def _unusable(message: str, hint: str = "") -> Refusal:
    return Refusal("bad_key_file", message, ClientExit.DENIED, hint=hint)
