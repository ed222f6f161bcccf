"""Sends what a job says and makes to the server: its journal, its log, its artifacts, its output folder."""

from __future__ import annotations

import errno
import json
import shutil
from itertools import islice
from pathlib import Path

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
        self._read = self._translated = 0
        self._artifacts: set[str] = set()
        folder.shipped.write_bytes(b"")

    def send(self, link: JobLink) -> bool:
        """Whether anything was new. A picture is there before the event that shows it."""
        self._translate()
        self._send_artifacts(link)
        before = self._journal_sent, self._log_sent
        self._journal_sent = self._append(
            link, "journal", self._folder.shipped, self._translated, self._journal_start, self._journal_sent
        )
        log_path = self._folder.job.log_path
        size = log_path.stat().st_size if log_path.exists() else 0
        self._log_sent = self._append(link, "log", log_path, size, self._log_start, self._log_sent)
        return before != (self._journal_sent, self._log_sent)

    def _translate(self) -> None:
        """New lines of the journal, with the server's paths in place of this machine's."""
        with self._folder.shipped.open("r+b", buffering=0) as out:
            out.seek(self._translated)
            for offset, line in read_journal(self._folder.job.journal_path, self._read):
                for here, there in self._paths:
                    line = line.replace(here, there)
                if out.write(line) < len(line):
                    raise OSError(errno.ENOSPC, "no space left for a line")
                self._translated += len(line)
                self._read = offset

    def _send_artifacts(self, link: JobLink) -> None:
        for path in sorted(self._folder.job.artifacts.iterdir()):
            if path.name not in self._artifacts and not path.name.startswith("."):
                send_file(link, f"artifacts/{path.name}", path, hash_file(path))
                self._artifacts.add(path.name)

    def _append(self, link: JobLink, what: str, path: Path, end: int, start: int, sent: int) -> int:
        """Up to byte `end`: to run after a file that grows all the time would leave the other behind."""
        while sent - start < end:
            content = read_part(path, sent - start, min(BATCH, end - (sent - start)))
            if what == "journal":
                content = content[: content.rfind(b"\n") + 1] or next(iter(_line_at(path, sent - start)), b"")
            try:
                sent = link.append(what, content, sent)
            except Refused as refused:
                told = refused.hint.rpartition(" ")[2]
                if refused.code != "offset_mismatch" or not told.isdigit() or int(told) == sent:
                    raise
                # An answer was lost: the server says where it is.
                sent = int(told)
        return sent


def _line_at(path: Path, first: int) -> list[bytes]:
    """One that is longer than a batch goes alone."""
    return [line for _, line in islice(read_journal(path, first), 1)]


class OutputSync:
    """The output folder: its newest checkpoint while the job runs, all of it at the end."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._hashes: dict[tuple[str, int, int], str] = {}
        self._sent: list[str] = []

    def checkpoints(self, link: JobLink) -> None:
        """The newest complete one and the best, where they are new. The trainer may prune them meanwhile."""
        output = self._folder.output
        complete = [each.name for each in list_checkpoints(output) if each.manifest is not None]
        best = output / BEST
        best_name = best.readlink().name if best.is_symlink() else None
        names = complete[:1] if best_name in {None, *complete[:1]} else [*complete[:1], str(best_name)]
        if not names or names == self._sent:
            return
        copies = self._folder.path / "snapshot"
        shutil.rmtree(copies, ignore_errors=True)
        try:
            for name in names:
                shutil.copytree(output / name, copies / name, copy_function=_link_or_copy)
        except (FileNotFoundError, shutil.Error):
            # One was pruned just now: there is a newer one.
            return
        self._copy_small(copies)
        self._publish(link, copies, best=best_name)
        self._sent = names
        shutil.rmtree(copies)

    def everything(self, link: JobLink) -> None:
        """When the trainer is gone."""
        best = self._folder.output / BEST
        self._publish(link, self._folder.output, best=best.readlink().name if best.is_symlink() else None)

    def _copy_small(self, copies: Path) -> None:
        """Files beside the checkpoints, such as the metrics, as they are now: the trainer goes on writing."""
        for path in self._folder.output.iterdir():
            if path.is_file() and not path.name.startswith(".") and path.stat().st_size <= SMALL_BYTES:
                shutil.copy2(path, copies / path.name)

    def _publish(self, link: JobLink, root: Path, *, best: str | None) -> None:
        """What is in `root`, as if it were the output folder."""
        sources = {str(path.relative_to(root)): path for path in _files(root)}
        hashes = {name: self._hash(path) for name, path in sources.items()}
        listed = {name: {"bytes": path.stat().st_size, "sha256": hashes[name]} for name, path in sources.items()}
        while missing := link.publish({"files": listed, "best": best}):
            for name in missing:
                send_file(link, f"output/{name}", sources[name], hashes[name])

    def _hash(self, path: Path) -> str:
        """Checkpoints say it in their manifest; anything else is read once."""
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = _told_hash(path) or hash_file(path)
        return self._hashes[key]


def _files(root: Path) -> list[Path]:
    """In order of name; neither hidden ones nor the link to the best checkpoint."""
    found: list[Path] = []
    for entry in sorted(root.iterdir()):
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        found += [entry] if entry.is_file() else [path for path in sorted(entry.rglob("*")) if path.is_file()]
    return found


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _told_hash(path: Path) -> str | None:
    """Of a file of a checkpoint: its manifest says it."""
    for parent in path.parents:
        if parent.name.startswith("checkpoint-") and (parent / MANIFEST).is_file():
            entry = json.loads((parent / MANIFEST).read_bytes())["files"].get(str(path.relative_to(parent)))
            return entry["sha256"] if entry else None
    return None


def send_file(link: JobLink, name: str, path: Path, sha256: str) -> None:
    """From where an earlier attempt at it was broken off; what is one part is sent whole, without asking."""
    total = path.stat().st_size
    sent, complete = link.offset(name) if total > PART else (0, False)
    if complete or sent > total:
        sent = 0
    while True:
        sent = link.put(name, read_part(path, sent, PART), sent, total, sha256)
        if sent >= total:
            return
