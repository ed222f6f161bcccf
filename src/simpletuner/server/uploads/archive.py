"""Unpacks a zip into a stage, or refuses it whole: nothing an archive says about itself is believed."""

from __future__ import annotations

import shutil
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from simpletuner.errors import UserError
from simpletuner.server.uploads.media_types import ARCHIVES, is_junk
from simpletuner.server.uploads.places import fault_of_path, shown_text
from simpletuner.server.uploads.stage import Stage, folded, naming_failures

COPY_BYTES = 1 << 20
TAIL_BYTES = (1 << 16) + 22
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
RECORD_BYTES = 46
UTF8_FLAG = 0x800
ENCRYPTED_FLAGS = 0x1 | 0x40
METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, RuntimeError, ValueError)


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """On actual bytes and entries."""

    entry_bytes: int = 4 << 30
    total_bytes: int = 50 << 30
    num_entries: int = 500_000
    ratio: int = 200
    """Unpacked ÷ packed, over the whole archive."""


def unpack(archive: Path, stage: Stage, limits: ArchiveLimits) -> None:
    """Raises UserError `bad_archive`, naming the entry, before or while it unpacks; `disk_full`."""
    packed_bytes = archive.stat().st_size
    with archive.open("rb") as file:
        _check_directory(file, limits)
        try:
            with zipfile.ZipFile(file) as opened:
                contents = _check_entries(opened, packed_bytes, limits)
                stage.expect(sum(entry.file_size for entry, _ in contents.files))
                for name in contents.junk:
                    stage.skip(name, "hidden files are not read")
                for entry, name in contents.files:
                    _unpack_entry(opened, entry, name, stage)
        except UnicodeDecodeError as error:
            name = shown_text(bytes(error.object).decode(errors="backslashreplace"))
            raise bad_archive(f"The name {name} is not UTF-8.", "Pack it with a tool that writes UTF-8.") from error
        except DAMAGED as error:
            raise bad_archive(f"The archive cannot be read: {error or type(error).__name__}.") from error


def bad_archive(message: str, hint: str = "Pack it again, without this.") -> UserError:
    return UserError("bad_archive", message, hint=hint, pointer="/file")


def _check_directory(file: IO[bytes], limits: ArchiveLimits) -> None:
    """Count the entries without keeping them: the library would read millions into memory first."""
    start, num_bytes = _find_directory(file)
    file.seek(start)
    left = num_bytes
    num_entries = 0
    while left >= RECORD_BYTES:
        record = file.read(RECORD_BYTES)
        if record[:4] != b"PK\x01\x02":
            raise bad_archive("The archive's list of entries is damaged.", "Pack it again.")
        more = sum(struct.unpack_from("<3H", record, 28))
        file.seek(more, 1)
        left -= RECORD_BYTES + more
        num_entries += 1
        if num_entries > limits.num_entries:
            raise bad_archive(f"The archive has more than {limits.num_entries} entries.", "Split it.")
    file.seek(0)


def _find_directory(file: IO[bytes]) -> tuple[int, int]:
    """Where the list of entries begins, and its bytes."""
    size = file.seek(0, 2)
    tail_start = max(0, size - TAIL_BYTES)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < END.size:
        raise bad_archive("The file is no zip archive, or its end is missing.", "Pack it again.")
    num_bytes = END.unpack_from(tail, at)[5]
    end = tail_start + at
    if at >= LOCATOR64.size and tail[at - LOCATOR64.size :][:4] == b"PK\x06\x07":
        end -= LOCATOR64.size + END64.size
        file.seek(max(0, end))
        record = file.read(END64.size)
        if len(record) == END64.size and record[:4] == b"PK\x06\x06":
            num_bytes = END64.unpack(record)[8]
    if num_bytes > end:
        raise bad_archive("The archive's list of entries is damaged.", "Pack it again.")
    return end - num_bytes, num_bytes


def _check_entries(opened: zipfile.ZipFile, packed_bytes: int, limits: ArchiveLimits) -> _Contents:
    """Nothing is written before every entry has passed."""
    contents = _Contents()
    names = _Names()
    total = 0
    for entry in opened.infolist():
        name = _read_name(entry)
        _check_kind(entry, name)
        is_harmless = not (name.startswith("/") or ".." in name.split("/") or "\\" in name)
        if is_harmless and is_junk(name):
            contents.junk.append(name)
            continue
        if reason := fault_of_path(name.removesuffix("/")):
            raise bad_archive(f"{shown_text(name)}: {reason}.", "Rename it and pack it again.")
        names.add(name)
        if entry.is_dir():
            continue
        total += entry.file_size
        _check_sizes(entry, name, total, packed_bytes, limits)
        contents.files.append((entry, name))
    return contents


def _read_name(entry: zipfile.ZipInfo) -> str:
    """As it was written; the library cuts it at a NUL and guesses an encoding."""
    if entry.flag_bits & UTF8_FLAG:
        return entry.orig_filename
    try:
        return entry.orig_filename.encode("cp437").decode()
    except UnicodeError as error:
        shown = shown_text(entry.orig_filename)
        raise bad_archive(f"The name {shown} is not UTF-8.", "Pack it with a tool that writes UTF-8 names.") from error


def _check_kind(entry: zipfile.ZipInfo, name: str) -> None:
    mode = entry.external_attr >> 16
    shown = shown_text(name)
    if stat.S_ISLNK(mode):
        raise bad_archive(f"{shown} is a link.")
    if stat.S_IFMT(mode) not in {0, stat.S_IFREG, stat.S_IFDIR}:
        raise bad_archive(f"{shown} is a device, pipe or socket.")
    if entry.flag_bits & ENCRYPTED_FLAGS:
        raise bad_archive(f"{shown} is encrypted.", "Pack it again without a password.")
    if entry.compress_type not in METHODS:
        raise bad_archive(f"{shown} is packed with method {entry.compress_type}.", "Pack it with deflate, the usual.")
    if PurePosixPath(name).suffix.lower() in ARCHIVES and not is_junk(name):
        raise bad_archive(f"{shown} is an archive in the archive.", "Unpack it first.")


def _check_sizes(entry: zipfile.ZipInfo, name: str, total: int, packed_bytes: int, limits: ArchiveLimits) -> None:
    if entry.file_size > limits.entry_bytes:
        raise bad_archive(f"{shown_text(name)} has more than {limits.entry_bytes} bytes.", "Upload it by itself.")
    if total > limits.total_bytes:
        raise bad_archive(f"Up to {shown_text(name)} it unpacks to more than {limits.total_bytes} bytes.", "Split it.")
    if total > packed_bytes * limits.ratio:
        message = f"Up to {shown_text(name)} it unpacks to more than {limits.ratio} times its size."
        raise bad_archive(message, "Upload the files by themselves.")


def _unpack_entry(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, name: str, stage: Stage) -> None:
    """The library reads no more than the size that was checked, and holds the sum of the bytes against the entry's."""
    file = stage.begin(name)
    if file is None:
        return
    try:
        with file, opened.open(entry) as source, naming_failures(name):
            shutil.copyfileobj(source, file, COPY_BYTES)
            num_bytes = file.tell()
    except DAMAGED as error:
        raise bad_archive(
            f"{shown_text(name)} is damaged: {error or type(error).__name__}.", "Pack it again."
        ) from error
    if num_bytes != entry.file_size:
        message = f"{shown_text(name)} unpacks to {num_bytes} bytes; the archive says {entry.file_size}."
        raise bad_archive(message, "Pack it again.")
    stage.finish(file, name)


@dataclass(slots=True)
class _Contents:
    files: list[tuple[zipfile.ZipInfo, str]] = field(default_factory=list[tuple[zipfile.ZipInfo, str]])
    junk: list[str] = field(default_factory=list[str])


class _Names:
    """Each name once, also where case does not count, and none both file and folder."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}

    def add(self, name: str) -> None:
        """A folder's name ends in `/`. Raises UserError `bad_archive`."""
        *above, last = name.split("/")
        folder = ""
        for part in above:
            folder = f"{folder}/{part}" if folder else part
            self._add_folder(folder)
        if not last:
            return
        key = folded(name)
        if other := self._files.get(key):
            how = "is there twice" if other == name else f"and {shown_text(other)} differ only in case"
            raise bad_archive(f"{shown_text(name)} {how}.", "Rename one of them.")
        if key in self._folders:
            raise bad_archive(f"{shown_text(name)} is both a file and a folder.", "Rename one of them.")
        self._files[key] = name

    def _add_folder(self, folder: str) -> None:
        key = folded(folder)
        other = self._folders.setdefault(key, folder)
        if other != folder:
            message = f"The folders {shown_text(folder)} and {shown_text(other)} differ only in case."
            raise bad_archive(message, "Rename one of them.")
        if key in self._files:
            raise bad_archive(f"{shown_text(folder)} is both a file and a folder.", "Rename one of them.")
