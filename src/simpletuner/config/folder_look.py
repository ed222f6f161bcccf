"""A glance into a dataset's folder, for what a person mends before a job is started. The ledger looks at every file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from simpletuner.config.picture_files import picture_extensions
from simpletuner.errors import Level, Problem

_MOST_FILES = 2000
_WINDOWS = re.compile(r"\\|(^|/)[A-Za-z]:(/|$)")


def missing_folder_hint(root: str) -> str:
    """Why a folder may not be there, from its path alone."""
    path = Path(root)
    if path.is_file():
        return "It is a file: name the folder that holds the pictures."
    if _WINDOWS.search(root):
        return "It is a path of Windows: here paths are written /like/this."
    if root != root.strip() and Path(root.strip()).is_dir():
        return "There is a space at its end."
    siblings = [child.name for child in path.parent.iterdir() if child.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    return f"Did you mean {path.parent / near[0]}?" if near else "Create it or correct the path."


def look_into(entry: Mapping[str, Any], pointer: str) -> Iterator[Problem]:
    """Warnings about a folder of pictures that is there."""
    root = Path(entry["instance_data_dir"])
    files = [path for path in islice(root.rglob("*"), _MOST_FILES) if path.is_file()]
    suffixes = Counter(path.suffix.lower() for path in files)
    if not suffixes.keys() & picture_extensions():
        if len(files) < _MOST_FILES:
            yield _no_pictures(root, suffixes, f"{pointer}/instance_data_dir")
        return
    if entry["caption_strategy"] == "textfile" and not suffixes[".txt"]:
        yield _no_captions(root, suffixes, f"{pointer}/caption_strategy")


def _no_pictures(root: Path, suffixes: Counter[str], pointer: str) -> Problem:
    message, hint = f"There is no picture in {root}.", "Put pictures into it or correct the path."
    if suffixes:
        suffix, count = suffixes.most_common(1)[0]
        message = f"There is no picture in {root} that can be read, but {count} file(s) {suffix or 'without suffix'}."
        hint = "Pictures end in .jpg, .png, .webp or another suffix that Pillow opens."
        if suffix in (".heic", ".heif"):
            hint = "Convert them to JPEG or PNG first."
        elif suffix in (".zip", ".tar", ".gz", ".7z", ".rar"):
            hint = "Unpack it first."
    return Problem(code="no_pictures", message=message, hint=hint, pointer=pointer, level=Level.WARNING)


def _no_captions(root: Path, suffixes: Counter[str], pointer: str) -> Problem:
    hint = "Write one .txt for each picture, or choose another caption_strategy."
    if suffixes[".caption"]:
        hint = f"There are {suffixes['.caption']} .caption files: rename them to .txt."
    elif suffixes[".json"] or suffixes[".jsonl"]:
        hint = "Captions in one JSONL file are read with caption_strategy parquet."
    message = f"No picture in {root} has a .txt caption beside it."
    return Problem(code="no_captions", message=message, hint=hint, pointer=pointer, level=Level.WARNING)
