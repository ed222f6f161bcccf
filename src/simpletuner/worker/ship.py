"""Sends what a job says and makes to the server: its journal, its log, its artifacts, its output folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from simpletuner.checkpoints import BEST, MANIFEST, hash_file, list_checkpoints
from simpletuner.events import read_journal
from simpletuner.worker.assignment import Assignment, RunFolder
from simpletuner.worker.link import JobLink, Refused, read_part

BATCH = 1 << 20
PART = 16 << 20
SMALL_BYTES = 64 << 20


class Record:
    """The journal and the log. `send` raises as the link does; the next call goes on where the server is."""

    def __init__(self, folder: RunFolder, assignment: Assignment, *, journal_offset: int, log_offset: int) -> None:
        self._folder = folder
        self._paths = folder.server_paths(assignment)
        self._journal_start, self._log_start = journal_offset, log_offset
        self._journal_sent, self._log_sent = journal_offset, log_offset
        self._read = 0
        self._artifacts: set[str] = set()
        folder.shipped.write_bytes(b"")

    def send(self, link: JobLink) -> bool:
        """Whether anything was new. A picture is there before the event that shows it."""
        self._translate()
        self._send_artifacts(link)
        before = self._journal_sent, self._log_sent
        self._journal_sent = self._append(
            link, "journal", self._folder.shipped, self._journal_start, self._journal_sent, whole_lines=True
        )
        self._log_sent = self._append(link, "log", self._folder.job.log_path, self._log_start, self._log_sent)
        return before != (self._journal_sent, self._log_sent)

    def _translate(self) -> None:
        """New lines of the journal, with the server's paths in place of this machine's."""
        with self._folder.shipped.open("ab") as out:
            for offset, line in read_journal(self._folder.job.journal_path, self._read):
                for here, there in self._paths:
                    line = line.replace(here, there)
                out.write(line)
                self._read = offset

    def _send_artifacts(self, link: JobLink) -> None:
        for path in sorted(self._folder.job.artifacts.iterdir()):
            if path.name not in self._artifacts and not path.name.startswith("."):
                send_file(link, f"artifacts/{path.name}", path, hash_file(path))
                self._artifacts.add(path.name)

    def _append(self, link: JobLink, what: str, path: Path, start: int, sent: int, *, whole_lines: bool = False) -> int:
        while content := _next_part(path, sent - start, whole_lines=whole_lines):
            try:
                sent = link.append(what, content, sent)
            except Refused as refused:
                if refused.code != "offset_mismatch":
                    raise
                # An answer was lost: the server says where it is.
                sent = int(refused.hint.rpartition(" ")[2])
        return sent


def _next_part(path: Path, first: int, *, whole_lines: bool) -> bytes:
    if not path.exists():
        return b""
    content = read_part(path, first, BATCH)
    if whole_lines and not content.endswith(b"\n"):
        end = content.rfind(b"\n") + 1
        # A line longer than a part goes alone.
        content = content[:end] or (read_journal_line(path, first) if content else b"")
    return content


def read_journal_line(path: Path, first: int) -> bytes:
    return next((line for _, line in read_journal(path, first)), b"")


class OutputSync:
    """The output folder: its complete checkpoints while the job runs, all of it at the end."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._hashes: dict[tuple[str, int, int], str] = {}
        self._told: dict[str, Any] = {}

    def checkpoints(self, link: JobLink) -> None:
        """Nothing where none is new. A checkpoint that is pruned meanwhile is left to the next call."""
        output = self._folder.output
        complete = [each.path for each in list_checkpoints(output) if each.manifest is not None]
        names = sorted(path.name for path in complete)
        if not names or names == self._told.get("names"):
            return
        try:
            files = [file for path in complete for file in _files(output, path)]
            self._publish(link, [*files, *self._snapshot()])
        except FileNotFoundError:
            return
        self._told["names"] = names

    def everything(self, link: JobLink) -> None:
        """When the trainer is gone."""
        output = self._folder.output
        hidden = (path for path in output.rglob("*") if path.relative_to(output).parts[0].startswith("."))
        left_out = set(hidden)
        files = [path for path in sorted(output.rglob("*")) if path.is_file() and path not in left_out]
        best = output / BEST
        self._publish(link, [(path, path) for path in files if best not in path.parents])

    def _snapshot(self) -> list[tuple[Path, Path]]:
        """Small files beside the checkpoints, such as the metrics, as they are now: the trainer goes on writing."""
        copies = self._folder.path / "snapshot"
        copies.mkdir(exist_ok=True)
        found: list[tuple[Path, Path]] = []
        for path in sorted(self._folder.output.iterdir()):
            if path.is_file() and not path.name.startswith(".") and path.stat().st_size <= SMALL_BYTES:
                found.append((path, Path(shutil.copy2(path, copies / path.name))))
        return found

    def _publish(self, link: JobLink, files: Iterable[tuple[Path, Path]]) -> None:
        """`files`: where each is in the output folder, and where its bytes are."""
        output = self._folder.output
        sources = {str(path.relative_to(output)): source for path, source in files}
        hashes = {name: self._hash(source) for name, source in sources.items()}
        listed = {name: {"bytes": source.stat().st_size, "sha256": hashes[name]} for name, source in sources.items()}
        best = output / BEST
        body = {"files": listed, "best": best.readlink().name if best.is_symlink() else None}
        while missing := link.publish(body):
            for name in missing:
                send_file(link, f"output/{name}", sources[name], hashes[name])

    def _hash(self, path: Path) -> str:
        """Checkpoints say it in their manifest; anything else is read once."""
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = _told_hash(path) or hash_file(path)
        return self._hashes[key]


def _files(output: Path, checkpoint: Path) -> list[tuple[Path, Path]]:
    return [(path, path) for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def _told_hash(path: Path) -> str | None:
    for parent in path.parents:
        if (parent / MANIFEST).is_file() and parent / MANIFEST != path:
            entry = json.loads((parent / MANIFEST).read_bytes())["files"].get(str(path.relative_to(parent)))
            return entry["sha256"] if entry else None
        if parent.name == "output":
            break
    return None


def send_file(link: JobLink, name: str, path: Path, sha256: str) -> None:
    """From where an earlier attempt at it was broken off."""
    total = path.stat().st_size
    sent, complete = link.offset(name)
    if complete or sent > total:
        sent = 0
    while True:
        sent = link.put(name, read_part(path, sent, PART), sent, total, sha256)
        if sent >= total:
            return
