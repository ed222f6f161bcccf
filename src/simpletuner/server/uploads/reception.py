"""All that receives files: one for a server."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from simpletuner.errors import UserError
from simpletuner.server.uploads.archive import ArchiveLimits, unpack
from simpletuner.server.uploads.places import Places, check_folder_name
from simpletuner.server.uploads.sessions import Session, Sessions
from simpletuner.server.uploads.stage import (
    FileResult,
    OnConflict,
    Stage,
    folded,
    naming_failures,
    open_stage,
    recover_stages,
)

ARCHIVE = "archive"
MOST_DRAWING = 2


class Reception:
    """Stages, sessions and limits of one datasets folder."""

    def __init__(
        self, datasets_dir: Path, records: Path, *, most_bytes: int, limits: ArchiveLimits | None = None
    ) -> None:
        """`records` keeps the sessions; `most_bytes` is of one request, and of a session in all its parts."""
        self.places = Places(datasets_dir)
        self.sessions = Sessions(records, self.places)
        self.most_bytes = most_bytes
        self.limits = limits or ArchiveLimits()
        self.drawing = threading.BoundedSemaphore(MOST_DRAWING)
        """Held while a thumbnail is made: a large picture takes half a gigabyte of memory."""
        self._committing = threading.Lock()

    def recover(self) -> None:
        """At the start of a server: what a dead one left is finished or removed."""
        recover_stages(self.places)
        self.sessions.forget_old()

    def create_folder(self, parent_path: str, name: str) -> Path:
        """Raises UserError `bad_path`, `already_exists`, and as `Places.folder` of the parent."""
        parent = self.places.folder(parent_path, pointer="/parent_path")
        check_folder_name(name)
        path = parent / name
        with self._committing, naming_failures(name):
            if other := next((each.name for each in parent.iterdir() if folded(each.name) == folded(name)), None):
                hint = "Upload into it, or choose another name."
                raise UserError("already_exists", f"{parent} holds {other} already.", hint=hint, pointer="/folder_name")
            path.mkdir()
        return path

    @contextmanager
    def stage(self) -> Generator[Stage]:
        with open_stage(self.places, self._committing) as stage:
            yield stage

    def store_archive(self, archive: Path, target: Path, on_conflict: OnConflict) -> list[FileResult]:
        """Raises UserError `bad_archive`, `disk_full`; then nothing has changed."""
        with self.stage() as stage:
            unpack(archive, stage, self.limits)
            return stage.commit(target, on_conflict)

    def store_session(self, session: Session) -> tuple[list[FileResult], Path]:
        """All bytes are there: into their place, in the folder that is told too. Raises UserError.

        The upload is then over, unless the target is gone or the storage fails: that can be mended and tried again.
        """
        with self.sessions.finishing(session):
            target = self.places.folder(session.target_path, pointer="/target_path")
            self.sessions.check_sum(session)
            part = self.sessions.part(session)
            try:
                if session.name.lower().endswith(".zip"):
                    results = self.store_archive(part, target, session.on_conflict)
                else:
                    results = self._store_part(part, target, session.on_conflict, session.name)
            except UserError as error:
                if error.code == "bad_archive":
                    self.sessions.forget(session)
                raise
            self.sessions.forget(session)
        return results, target

    def _store_part(self, part: Path, target: Path, on_conflict: OnConflict, name: str) -> list[FileResult]:
        """`part` stays as it is until its upload is over, so that nothing is lost where this fails."""
        with self.stage() as stage:
            file = stage.begin(name)
            if file is not None:
                with file, naming_failures(name):
                    Path(file.name).unlink()
                    Path(file.name).hardlink_to(part)
                stage.adopt(Path(file.name), name)
            return stage.commit(target, on_conflict)


class ArchiveSink:
    """Takes the one archive of a form."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ARCHIVE

    @property
    def archive(self) -> Path:
        """Raises UserError `nothing_stored` where none came."""
        if not self._path.exists():
            hint = "Send the zip in the field file."
            raise UserError("nothing_stored", "The request holds no archive.", hint=hint, pointer="/file")
        return self._path

    def begin(self, name: str) -> IO[bytes]:
        if self._path.exists():
            raise UserError("invalid_field", "One archive at a time.", hint="Send each in a request of its own.")
        return self._path.open("wb")

    def finish(self, file: IO[bytes], name: str) -> None:
        file.close()
