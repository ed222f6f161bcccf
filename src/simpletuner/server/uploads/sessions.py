"""Uploads in parts: they outlive a broken connection and a server.

A session is a JSON file in `<state>/uploads`; its bytes are in the staging folder of the datasets, so that they can be
renamed into place. Its offset is the size of that file: there is nothing else to keep in step.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import IO

from pydantic import BaseModel

from simpletuner.errors import UserError
from simpletuner.job import write_atomic
from simpletuner.server.uploads.media_types import refuse_by_name
from simpletuner.server.uploads.places import Places, fault_of_path, shown_text
from simpletuner.server.uploads.stage import OnConflict, naming_failures

KEPT_S = 7 * 24 * 3600
SUFFIX = ".part"
UPLOAD_ID = re.compile(r"[0-9a-f]{24}")


CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Of a part: its first byte and how many there are."""

    first: int
    num_bytes: int


class Session(BaseModel):
    upload_id: str
    target_path: str
    name: str
    bytes: int
    sha256: str | None
    on_conflict: OnConflict
    owner: str


class Sessions:
    def __init__(self, folder: Path, places: Places) -> None:
        """`folder` keeps the records, private to this server."""
        self._folder = folder
        self._places = places
        self._lock = threading.Lock()
        self._writers: dict[str, object] = {}
        self._finishing: set[str] = set()

    def create(
        self, target_path: str, name: str, num_bytes: int, sha256: str | None, on_conflict: OnConflict, owner: str
    ) -> Session:
        """Raises UserError `bad_path`, `nothing_stored`, `disk_full`, and what `Places.folder` raises of the target."""
        self.forget_old()
        self._places.folder(target_path, pointer="/target_path")
        if reason := fault_of_path(name):
            raise UserError("bad_path", f"{shown_text(name)} is no usable name: {reason}.", pointer="/name")
        if not name.lower().endswith(".zip") and (refusal := refuse_by_name(name)):
            message = f"{shown_text(name)} would not be stored: {refusal.reason}."
            raise UserError("nothing_stored", message, hint=refusal.hint, pointer="/name")
        self._places.check_room(num_bytes, name)
        session = Session(
            upload_id=secrets.token_hex(12),
            target_path=target_path,
            name=name,
            bytes=num_bytes,
            sha256=sha256,
            on_conflict=on_conflict,
            owner=owner,
        )
        with naming_failures(name):
            self._places.staging.mkdir(exist_ok=True)
            self.part(session).touch()
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._record(session.upload_id), session.model_dump_json().encode())
        return session

    def get(self, upload_id: str, owner: str) -> Session:
        """Raises UserError `not_found`, also for another one's."""
        record = self._record(upload_id) if UPLOAD_ID.fullmatch(upload_id) else None
        if record is not None and record.is_file():
            session = Session.model_validate_json(record.read_bytes())
            if session.owner == owner and self.part(session).is_file():
                return session
        raise UserError("not_found", f"There is no upload {shown_text(upload_id)}.", hint="Begin a new one.")

    def offset(self, session: Session) -> int:
        """Bytes that have arrived."""
        return self.part(session).stat().st_size

    def part(self, session: Session) -> Path:
        return self._places.staging / (session.upload_id + SUFFIX)

    def open(self, session: Session, first: int) -> PartWriter:
        """Whoever opens last writes: a client that comes back need not wait for its dead connection.

        Raises UserError `offset_mismatch` unless `first` is the next byte.
        """
        with self._lock:
            offset = self.offset(session)
            if first != offset:
                hint = f"Go on with byte {offset}: HEAD tells it in Upload-Offset."
                raise UserError("offset_mismatch", f"{shown_text(session.name)} has {offset} bytes so far.", hint=hint)
            writer = PartWriter(self, session)
            self._writers[session.upload_id] = writer
            return writer

    def write(self, writer: PartWriter, file: IO[bytes], data: bytes) -> None:
        """Raises UserError `in_flight` where another request has taken over, `disk_full`."""
        with self._lock:
            if self._writers.get(writer.session.upload_id) is not writer:
                raise UserError("in_flight", f"Another request goes on with {shown_text(writer.session.name)}.")
            with naming_failures(writer.session.name):
                file.write(data)

    def leave(self, writer: PartWriter) -> None:
        with self._lock:
            if self._writers.get(writer.session.upload_id) is writer:
                del self._writers[writer.session.upload_id]

    @contextmanager
    def finishing(self, session: Session) -> Generator[None]:
        """Held while a whole upload goes into its place. Raises UserError `in_flight` for the second who tries."""
        with self._lock:
            if session.upload_id in self._finishing:
                raise UserError("in_flight", f"{shown_text(session.name)} is being stored.", hint="Ask again later.")
            self._finishing.add(session.upload_id)
        try:
            yield
        finally:
            with self._lock:
                self._finishing.discard(session.upload_id)

    def check_sum(self, session: Session) -> None:
        """Raises UserError `nothing_stored` where the whole is not what was announced; the upload is then gone."""
        if session.sha256 is None:
            return
        with self.part(session).open("rb") as file:
            found = file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
        if found != session.sha256.lower():
            self.forget(session)
            message = f"{shown_text(session.name)} has the SHA-256 {found}, not {session.sha256}: it was not stored."
            raise UserError("nothing_stored", message, hint="Upload it again from its start.")

    def forget(self, session: Session) -> None:
        self._record(session.upload_id).unlink(missing_ok=True)
        self.part(session).unlink(missing_ok=True)

    def forget_old(self) -> None:
        """Uploads that nobody went on with for a week, and records whose bytes are gone."""
        before = time.time() - KEPT_S
        for part in self._places.staging.glob("*" + SUFFIX):
            if part.stat().st_mtime < before:
                part.unlink(missing_ok=True)
        for record in self._folder.glob("*.json"):
            if not (self._places.staging / (record.stem + SUFFIX)).exists():
                record.unlink(missing_ok=True)

    def _record(self, upload_id: str) -> Path:
        return self._folder / f"{upload_id}.json"


class PartWriter:
    """Appends to a session's file until its request ends or another takes over."""

    def __init__(self, sessions: Sessions, session: Session) -> None:
        self.session = session
        self._sessions = sessions
        # Unbuffered: what was written counts, whatever becomes of this process.
        self._file = sessions.part(session).open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        self._sessions.write(self, self._file, data)

    def close(self) -> None:
        self._file.close()
        self._sessions.leave(self)


def parse_range(header: str | None, session: Session) -> ByteRange | None:
    """What `Content-Range` says; None for `bytes */<all>`, which sends nothing and asks to store what has arrived.

    Raises UserError `invalid_field`.
    """
    found = CONTENT_RANGE.fullmatch(header or "")
    if found is None or found[3] not in {"*", str(session.bytes)}:
        hint = f"For example Content-Range: bytes 0-{max(0, session.bytes - 1)}/{session.bytes}."
        raise UserError("invalid_field", "Content-Range is missing or wrong.", hint=hint, pointer="/Content-Range")
    if found[1] is None:
        return None
    first, last = int(found[1]), int(found[2])
    if not first <= last < session.bytes:
        message = f"Bytes {first} to {last} are not all in a file of {session.bytes} bytes."
        raise UserError("invalid_field", message, pointer="/Content-Range")
    return ByteRange(first, last - first + 1)
