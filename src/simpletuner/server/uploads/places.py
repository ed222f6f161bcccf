"""Where files of datasets may be: real paths below one root, and the names that may be written there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from simpletuner.errors import UserError

STAGING = ".uploads"
TRASH = ".trash"
MOST_NAME_BYTES = 255
MOST_PATH_BYTES = 1000
FOLDER_FORBIDDEN = frozenset('<>:"|?*')


class Places:
    """Paths under `<datasets>`. What a client writes is relative to it, or absolute and inside."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    @property
    def staging(self) -> Path:
        return self.root / STAGING

    @property
    def trash(self) -> Path:
        return self.root / TRASH

    def locate(self, written: str, *, pointer: str = "/path") -> Path:
        """The real path of something that exists.

        Raises UserError `bad_path` for `..`, hidden and unwritable names, `path_outside_root` for what is elsewhere,
        also by a link, `not_found`.
        """
        wanted = self._joined(written, pointer)
        real = Path(os.path.realpath(wanted))
        self._check_inside(real, written, pointer)
        if not real.exists():
            hint = "POST /api/datasets/folders makes a folder, GET /api/datasets/browse shows what there is."
            raise UserError("not_found", f"There is no {written} in {self.root}.", hint=hint, pointer=pointer)
        return real

    def folder(self, written: str, *, pointer: str = "/path") -> Path:
        """As `locate`. Raises UserError `bad_path` too where it is a file."""
        found = self.locate(written, pointer=pointer)
        if not found.is_dir():
            raise UserError("bad_path", f"{written} is a file, not a folder.", pointer=pointer)
        return found

    def file(self, written: str, *, pointer: str = "/path") -> Path:
        """As `locate`. Raises UserError `bad_path` too where it is a folder."""
        found = self.locate(written, pointer=pointer)
        if not found.is_file():
            raise UserError("bad_path", f"{written} is a folder, not a file.", pointer=pointer)
        return found

    def entry(self, written: str, *, pointer: str = "/path") -> Path:
        """A file, folder or link itself, not where a link leads; never the root. Raises as `locate`."""
        above, _, name = written.rstrip("/").rpartition("/")
        if reason := fault_of_part(name):
            raise UserError("bad_path", f"{shown_text(written)} is no usable path: {reason}.", pointer=pointer)
        found = self.folder(above, pointer=pointer) / name
        if not os.path.lexists(found):
            raise UserError("not_found", f"There is no {written} in {self.root}.", pointer=pointer)
        return found

    def shown(self, path: Path) -> str:
        """Relative to the root, with `/`; the root itself is the empty text."""
        return "" if path == self.root else path.relative_to(self.root).as_posix()

    def holds(self, path: Path) -> bool:
        """Whether `path`, with links followed as far as it exists, is inside the root."""
        return Path(os.path.realpath(path)).is_relative_to(self.root)

    def check_room(self, num_bytes: int, name: str) -> None:
        """Raises UserError `disk_full` where there can be no room for `num_bytes` more: running jobs need the rest."""
        free = shutil.disk_usage(self.root).free
        if num_bytes > free:
            message = f"{shown_text(name)} has {num_bytes} bytes; {free} are free in the datasets folder."
            raise UserError("disk_full", message, hint="Free some space and try again.")

    def _joined(self, written: str, pointer: str) -> Path:
        if reason := _unwritable(written) or (".." in written.split("/") and "it leads upwards (..)"):
            raise UserError("bad_path", f"{shown_text(written)} is no usable path: {reason}.", pointer=pointer)
        return self.root / written

    def _check_inside(self, real: Path, written: str, pointer: str) -> None:
        if not real.is_relative_to(self.root):
            hint = f"Uploads and datasets over HTTP stay inside {self.root} (--datasets-dir)."
            raise UserError(
                "path_outside_root", f"{written} is outside the datasets folder.", hint=hint, pointer=pointer
            )
        hidden = next((part for part in real.relative_to(self.root).parts if part.startswith(".")), None)
        if hidden is not None:
            raise UserError("bad_path", f"{written} leads to the hidden {hidden}.", pointer=pointer)


def check_folder_name(name: str) -> None:
    """Raises UserError `bad_path`. Stricter than for files, so that any system can hold a copy of the folder."""
    reason = fault_of_part(name)
    if reason is None and (found := sorted(FOLDER_FORBIDDEN & set(name))):
        reason = f"it holds {' '.join(found)}"
    if reason is None and "/" in name:
        reason = "it holds a separator"
    if reason:
        raise UserError("bad_path", f"{shown_text(name)} is no usable folder name: {reason}.", pointer="/folder_name")


def fault_of_path(name: str) -> str | None:
    """Why `name` cannot be a file's path below a folder; None where it can."""
    if reason := _unwritable(name):
        return reason
    if name.startswith("/"):
        return "it is absolute"
    if name[1:2] == ":" and name[0].isalpha():
        return "it begins with a drive letter"
    return next((reason for part in name.split("/") if (reason := fault_of_part(part))), None)


def fault_of_part(part: str) -> str | None:
    """Why `part` cannot be one name in a path; None where it can."""
    if reason := _unwritable(part):
        return reason
    if part in {"", "."}:
        return "it has an empty part"
    if part == "..":
        return "it leads upwards (..)"
    if part.startswith("."):
        return "it begins with a dot, and hidden files are not read"
    if part != part.strip():
        return "it begins or ends with a space"
    return f"it is longer than {MOST_NAME_BYTES} bytes" if len(part.encode()) > MOST_NAME_BYTES else None


def shown_text(text: str) -> str:
    """For messages: what cannot be printed is escaped, what is long is cut."""
    printable = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:200])
    return printable or "(empty)"


def _unwritable(text: str) -> str | None:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        return "it is not Unicode text"
    if num_bytes > MOST_PATH_BYTES:
        return f"it is longer than {MOST_PATH_BYTES} bytes"
    if "\\" in text:
        return "it holds a backslash"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        return "it holds control characters"
    return None
