"""One upload on its way: received into a hidden folder, then renamed into its place.

The hidden folder is on the file system of the datasets. What is to be renamed is written down before the first rename:
a server that dies in between leaves a list, and the next one carries it out. Before that, nothing has happened.
"""

from __future__ import annotations

import errno
import fcntl
import filecmp
import json
import logging
import os
import shutil
import tempfile
import threading
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from simpletuner.errors import UserError
from simpletuner.job import fsync_folder, write_atomic
from simpletuner.server.uploads.media_types import Refusal, is_junk, refuse_by_content, refuse_by_name
from simpletuner.server.uploads.places import Places, fault_of_path, shown_text

log = logging.getLogger(__name__)

OnConflict = Literal["error", "skip", "overwrite"]
Status = Literal["stored", "skipped", "error"]
PREFIX = "stage-"
MOVES = "moves.jsonl"


@dataclass(slots=True)
class FileResult:
    """What became of one file. `code` and `hint` are of errors, `reason` also of what was skipped."""

    name: str
    status: Status
    num_bytes: int = 0
    reason: str | None = None
    code: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class StagedFile:
    path: Path
    name: str
    """Below the target, with `/`."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Move:
    staged: StagedFile
    to: Path
    is_new: bool = False


class Stage:
    """Take files with `begin` and `finish`, or note why not; then `commit`, and in any case `close`."""

    def __init__(self, folder: Path, places: Places, committing: threading.Lock) -> None:
        """`committing` is held while names are compared and files renamed. `folder` is empty and this one's own."""
        self.folder = folder
        self.results: list[FileResult] = []
        self._places = places
        self._committing = committing
        self._files: list[StagedFile] = []
        self._keys: set[str] = set()
        # The kernel frees it at any death: a folder that nobody holds is a leftover.
        self._handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def expect(self, num_bytes: int) -> None:
        """Raises UserError `disk_full` where there is no room for what is to come."""
        self._places.check_room(num_bytes, "The upload")

    def begin(self, name: str) -> IO[bytes] | None:
        """A file to write the bytes of `name` into; None, noted in the results, where it is not taken."""
        if is_junk(name):
            self.results.append(FileResult(shown_text(name), "skipped", reason="hidden files are not read"))
            return None
        if reason := fault_of_path(name):
            return self._refuse(name, Refusal("bad_path", f"the name cannot be used: {reason}", "Rename it."))
        if refusal := refuse_by_name(name):
            return self._refuse(name, refusal)
        key = folded(name)
        if key in self._keys:
            refusal = Refusal("already_exists", "the upload holds this name twice", "Names that differ in case count.")
            return self._refuse(name, refusal)
        self._keys.add(key)
        return (self.folder / str(len(self._files))).open("wb")

    def finish(self, file: IO[bytes], name: str) -> None:
        """The file of the last `begin` is whole: look at its content."""
        file.close()
        self.adopt(Path(file.name), name)

    def adopt(self, path: Path, name: str) -> None:
        """Take a whole file that lies in the stage."""
        num_bytes = path.stat().st_size
        if refusal := refuse_by_content(path, name):
            path.unlink()
            self._refuse(name, refusal)
            return
        self._files.append(StagedFile(path, name, num_bytes))

    def skip(self, name: str, reason: str) -> None:
        self.results.append(FileResult(shown_text(name), "skipped", reason=reason))

    @property
    def num_taken(self) -> int:
        return len(self._files)

    def commit(self, target: Path, on_conflict: OnConflict) -> list[FileResult]:
        """Rename all that was taken below `target`; `results` then hold every file. Raises UserError `disk_full`."""
        with self._committing:
            moves = [move for staged in self._files if (move := self._place(target, staged, on_conflict))]
            if moves:
                _write_moves(self.folder, moves)
                _carry_out(moves)
        self.results += [FileResult(move.staged.name, "stored", move.staged.num_bytes) for move in moves]
        return self.results

    def close(self) -> None:
        """Remove what is left of the upload."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._handle)

    def _refuse(self, name: str, refusal: Refusal) -> None:
        row = FileResult(shown_text(name), "error", reason=refusal.reason, code=refusal.code, hint=refusal.hint)
        self.results.append(row)

    def _place(self, target: Path, staged: StagedFile, on_conflict: OnConflict) -> _Move | None:
        """Where a file goes; None, noted in the results, where it does not have to or must not."""
        to = target / staged.name
        if not self._places.holds(to.parent):
            self._refuse(staged.name, Refusal("path_outside_root", "a link leads out of the datasets folder"))
            return None
        blocked = next((part for part in _folders_between(target, to) if part.exists() and not part.is_dir()), None)
        if blocked is not None:
            reason = f"{blocked.name} is a file, not a folder"
            self._refuse(staged.name, Refusal("already_exists", reason, "Rename one of them."))
            return None
        if not (to.exists() or to.is_symlink()):
            return _Move(staged, to, is_new=True)
        return self._settle(to, staged, on_conflict)

    def _settle(self, to: Path, staged: StagedFile, on_conflict: OnConflict) -> _Move | None:
        if to.is_dir() and not to.is_symlink():
            self._refuse(staged.name, Refusal("already_exists", "a folder has this name", "Rename one of them."))
            return None
        if not to.is_symlink() and filecmp.cmp(staged.path, to, shallow=False):
            row = FileResult(staged.name, "stored", staged.num_bytes, reason="the same bytes were there")
            self.results.append(row)
            return None
        if on_conflict == "skip":
            self.skip(staged.name, "a file of this name was there")
            return None
        if on_conflict == "error":
            hint = "Send on_conflict=overwrite or on_conflict=skip, or rename it."
            self._refuse(staged.name, Refusal("already_exists", "another file of this name is there", hint))
            return None
        return _Move(staged, to, is_new=False)


@contextmanager
def open_stage(places: Places, committing: threading.Lock) -> Generator[Stage]:
    """Whatever happens, nothing of the upload stays behind."""
    with naming_failures("the upload"):
        places.staging.mkdir(exist_ok=True)
        stage = Stage(Path(tempfile.mkdtemp(prefix=PREFIX, dir=places.staging)), places, committing)
    try:
        yield stage
    finally:
        stage.close()


def recover_stages(places: Places) -> None:
    """At a server's start: carry out what a dead one had decided to rename, remove the rest of its uploads.

    Where the storage fails the upload stays staged, for the next start.
    """
    for folder in places.staging.glob(PREFIX + "*"):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            continue  # another server of the same datasets is at it
        try:
            for move in _read_moves(folder):
                _make_folders(move.to.parent)
                _rename(move.staged.path, move.to)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            log.warning("An upload that an earlier server had received stays in %s: %s", folder, error)
        finally:
            os.close(handle)


@contextmanager
def naming_failures(name: str) -> Generator[None]:
    """Turns what the storage says about `name` into a UserError `disk_full` or `permission_denied`."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            message = f"The disk is full: no room for {shown_text(name)}. Nothing of this request was stored."
            raise UserError("disk_full", message, hint="Free some space and try again.") from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            message = f"The server may not write {shown_text(name)} into the datasets folder: {error.strerror}."
            hint = "Give the account of the server write permission there."
            raise UserError("permission_denied", message, hint=hint) from error
        raise


def folded(name: str) -> str:
    """Equal for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _write_moves(folder: Path, moves: list[_Move]) -> None:
    lines = [json.dumps([move.staged.path.name, move.staged.num_bytes, str(move.to)]) for move in moves]
    write_atomic(folder / MOVES, ("\n".join(lines) + "\n").encode())


def _read_moves(folder: Path) -> list[_Move]:
    """Those still to do. After a power cut a file may be shorter than it was: it is left out."""
    if not (folder / MOVES).exists():
        return []
    moves: list[_Move] = []
    for line in (folder / MOVES).read_text().splitlines():
        name, num_bytes, to = json.loads(line)
        path = folder / name
        if path.exists() and path.stat().st_size == num_bytes:
            moves.append(_Move(StagedFile(path, name, num_bytes), Path(to)))
    return moves


def _carry_out(moves: list[_Move]) -> None:
    """All, or, where the storage fails, as good as none: what was replaced by then stays replaced."""
    undo: list[Path] = []
    try:
        for move in moves:
            undo += _make_folders(move.to.parent)
            with naming_failures(move.staged.name):
                _rename(move.staged.path, move.to)
            if move.is_new:
                undo.append(move.to)
        for folder in {move.to.parent for move in moves}:
            fsync_folder(folder)
    except (OSError, UserError):
        for path in reversed(undo):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def _make_folders(folder: Path) -> list[Path]:
    """The new ones, outermost first."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()][::-1]
    for part in missing:
        part.mkdir()
    return missing


def _rename(path: Path, to: Path) -> None:
    try:
        path.replace(to)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # A mount inside the datasets folder: copied beside, then renamed.
        beside = to.with_name(f".{path.parent.name}.tmp")
        try:
            shutil.copyfile(path, beside)
            beside.replace(to)
        finally:
            beside.unlink(missing_ok=True)


def _folders_between(target: Path, to: Path) -> list[Path]:
    """The folders below `target` on the way to `to`, innermost first."""
    return [part for part in to.parents if part != target and part.is_relative_to(target)]
