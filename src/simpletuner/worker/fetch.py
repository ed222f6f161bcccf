"""Brings what a job needs onto this machine: by content, only what is missing, from where it was broken off."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.checkpoints import BEST, hash_file
from simpletuner.errors import UserError
from simpletuner.jobs.inputs import Place
from simpletuner.worker.assignment import Assignment, RunFolder
from simpletuner.worker.link import JobLink, Unreachable

CONNECTIONS = 6
LISTING_S = 0.5
RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One file; `own` where the job may write to it, so that it must not share its bytes."""

    place: str
    path: str
    bytes: int
    sha256: str
    mtime_ns: int
    target: Path
    own: bool


class Fetch:
    """`check` raises where the job is not to go on; it is asked between files and parts."""

    def __init__(
        self, folder: RunFolder, assignment: Assignment, check: Callable[[], None], *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._assignment = assignment
        self._check = check
        self._sleep = sleep

    def run(self, link: JobLink) -> None:
        """Raises UserError `input_changed` for a file that is other than it was listed, and as the link does."""
        listing = self._listing(link)
        kinds = {place.name: place for place in self._assignment.places}
        fresh = [place for place in kinds.values() if place.kind == "cache" and self._is_new(place)]
        wanted = [
            self._wanted(kinds[name], row)
            for name, rows in listing.items()
            for row in rows
            if kinds[name].kind != "cache" or kinds[name] in fresh
        ]
        self._all(wanted)
        for place in fresh:
            _beside(self._folder.place(place)).mkdir(parents=True, exist_ok=True)
            _beside(self._folder.place(place)).rename(self._folder.place(place))
        self._link_best(listing)

    def _listing(self, link: JobLink) -> dict[str, list[dict[str, Any]]]:
        while True:
            self._check()
            try:
                listing = link.inputs()
            except Unreachable:
                self._sleep(RETRY_S)
                continue
            if listing is not None:
                return listing
            self._sleep(LISTING_S)

    def _is_new(self, place: Place) -> bool:
        """A cache that this worker has goes on being its own."""
        if self._folder.place(place).exists():
            return False
        shutil.rmtree(_beside(self._folder.place(place)), ignore_errors=True)
        return True

    def _wanted(self, place: Place, row: dict[str, Any]) -> _Wanted:
        root = self._folder.place(place)
        if place.kind == "cache":
            root = _beside(root)
        target = root / row["path"] if row["path"] else root
        if not target.resolve().is_relative_to(root.resolve()):
            raise UserError("bad_path", f"The server named {row['path']!r}, which leads out of its place.")
        own = place.kind in {"cache", "output"}
        return _Wanted(place.name, row["path"], row["bytes"], row["sha256"], row["mtime_ns"], target, own)

    def _all(self, wanted: list[_Wanted]) -> None:
        links = [JobLink(self._assignment) for _ in range(min(CONNECTIONS, max(1, len(wanted))))]
        shares: list[list[_Wanted]] = [[] for _ in links]
        for file in wanted:
            # Of equal files one connection brings the first, and finds the others there.
            shares[int(file.sha256[:8], 16) % len(links)].append(file)
        try:
            with ThreadPoolExecutor(len(links)) as pool:
                for done in [pool.submit(self._share, link, share) for link, share in zip(links, shares, strict=True)]:
                    done.result()
        finally:
            for link in links:
                link.close()

    def _share(self, link: JobLink, share: list[_Wanted]) -> None:
        for file in share:
            self._check()
            self._bring(link, file)

    def _bring(self, link: JobLink, file: _Wanted) -> None:
        content = self._folder.objects / file.sha256[:2] / file.sha256
        if not content.exists():
            self._download(link, file, content)
        file.target.parent.mkdir(parents=True, exist_ok=True)
        if file.own:
            shutil.move(content, file.target)
        else:
            _share_content(content, file.target)
        os.utime(file.target, ns=(file.mtime_ns, file.mtime_ns))

    def _download(self, link: JobLink, file: _Wanted, content: Path) -> None:
        content.parent.mkdir(parents=True, exist_ok=True)
        part = content.with_name(f".{content.name}.part")
        while True:
            self._check()
            try:
                self._go_on(link, file, part)
                break
            except Unreachable:
                self._sleep(RETRY_S)
        if hash_file(part) != file.sha256:
            part.unlink()
            message = f"{file.path} of {file.place} changed on the server while it was being sent."
            raise UserError("input_changed", message, hint="Leave datasets alone while a job starts, then retry it.")
        part.replace(content)

    def _go_on(self, link: JobLink, file: _Wanted, part: Path) -> None:
        first = part.stat().st_size if part.exists() else 0
        if first > file.bytes:
            part.unlink()
            first = 0
        if first == file.bytes:
            part.touch()
            return
        with link.read_input(file.place, file.path, first) as batches, part.open("ab") as out:
            for batch in batches:
                self._check()
                out.write(batch)

    def _link_best(self, listing: dict[str, list[dict[str, Any]]]) -> None:
        best = self._assignment.best
        if "output" in listing and best is not None and (self._folder.output / best).is_dir():
            (self._folder.output / BEST).symlink_to(best)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}-tmp")


def _share_content(content: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(content)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(content, target)
