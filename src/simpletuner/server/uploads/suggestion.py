"""What a folder is as a dataset: a valid dataloader entry, guessed from what is in it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from simpletuner.config.pairing import pair_files
from simpletuner.config.picture_files import DAMAGED
from simpletuner.server.uploads.media_types import kind_of

MEASURED = 64
"""Pictures whose header is read."""
NATIVE = 1024
STEP = 64
PAIRS = (
    ("target", ("source", "reference", "references", "input", "control")),
    ("targets", ("sources", "references", "inputs")),
    ("edited", ("original", "originals", "reference", "references", "source")),
    ("output", ("input",)),
    ("after", ("before",)),
)
"""Names of folders that people give to the pictures to learn, and to those that are edited into them."""
FILENAME_COLUMNS = ("file_name", "filename", "image", "path")
CAPTION_COLUMNS = ("caption", "text", "prompt")


@dataclass(slots=True)
class Suggestion:
    """`entry` is valid in a dataset file together with `conditioning`, the entries that it names."""

    entry: dict[str, Any]
    conditioning: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    """Files by kind."""
    num_captioned: int = 0
    """Pictures with a caption file."""
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    """Of the pictures measured: `<width>x<height>` → how many."""


def suggest_dataset(folder: Path) -> Suggestion:
    """Read the names in `folder` and a few headers. Raises OSError."""
    files = list(_walk(folder))
    pair = _find_pair(files)
    root = folder / pair[0] if pair else folder
    mine = [path.removeprefix(f"{pair[0]}/") for path in files if path.startswith(f"{pair[0]}/")] if pair else files
    pictures = [path for path in mine if kind_of(path) == "image"]
    texts = {path for path in mine if path.endswith(".txt")}
    captioned = sum(os.path.splitext(path)[0] + ".txt" in texts for path in pictures)  # noqa: PTH122 - once a file
    sizes = _measure(root, pictures)
    name = _identify(folder)
    entry: dict[str, Any] = {
        "id": name,
        "type": "local",
        "dataset_type": "image",
        "instance_data_dir": str(root),
        **_captions(root, mine, captioned),
        "resolution": _resolution(sizes),
        "resolution_type": "pixel_area",
        "crop": False,
        "cache_dir_vae": f"cache/{name}/vae",
    }
    conditioning: list[dict[str, Any]] = []
    if pair:
        mates = f"{name}-references"
        entry["conditioning_data"] = [mates]
        conditioning.append(
            {
                "id": mates,
                "type": "local",
                "dataset_type": "conditioning",
                "conditioning_type": "reference_strict",
                "instance_data_dir": str(folder / pair[1]),
                "cache_dir_vae": f"cache/{name}/vae-references",
            }
        )
    counts = Counter(kind_of(path) or "other" for path in files)
    shown = Counter(f"{width}x{height}" for width, height in sizes)
    return Suggestion(entry, conditioning, dict(sorted(counts.items())), captioned, dict(shown.most_common(20)))


def _walk(folder: Path) -> Iterator[str]:
    """Paths below `folder`, without hidden ones; links are not followed."""
    for here, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        prefix = "" if here == str(folder) else os.path.relpath(here, folder) + "/"
        yield from (prefix + name for name in sorted(names) if not name.startswith("."))


def _find_pair(files: Sequence[str]) -> tuple[str, str] | None:
    """Two folders of the top whose names say that one is edited into the other, and whose files pair up."""
    below: dict[str, list[str]] = {}
    for path in files:
        top, _, rest = path.partition("/")
        if rest and kind_of(path) == "image":
            below.setdefault(top, []).append(rest)
    names = {name.lower(): name for name in below}
    for target, sources in PAIRS:
        source = next((names[word] for word in sources if word in names), None)
        if target not in names or source is None:
            continue
        found = pair_files(below[names[target]], below[source])
        if found.mates and not found.missing and not found.ambiguous:
            return names[target], source
    return None


def _captions(root: Path, files: Sequence[str], captioned: int) -> dict[str, Any]:
    if captioned:
        return {"caption_strategy": "textfile"}
    tables = [path for path in files if "/" not in path and path.endswith(".jsonl")]
    for table in tables:
        if columns := _columns(root / table):
            return {"caption_strategy": "parquet", "parquet": {"path": table, **columns}}
    return {"caption_strategy": "filename"}


def _columns(table: Path) -> dict[str, Any] | None:
    """Of a JSON-lines table, from its first row; None where it names no pictures and captions."""
    with table.open("rb") as file:
        first = file.readline(64 << 10)
    try:
        row = json.loads(first)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    name = next((column for column in FILENAME_COLUMNS if isinstance(row.get(column), str)), None)
    caption = next((column for column in CAPTION_COLUMNS if row.get(column)), None)
    if name is None or caption is None:
        return None
    has_extension = kind_of(row[name]) == "image"
    return {"filename_column": name, "caption_column": caption, "identifier_includes_extension": has_extension}


def _measure(root: Path, pictures: Sequence[str]) -> list[tuple[int, int]]:
    """Sizes of some pictures, evenly spread."""
    step = max(1, len(pictures) // MEASURED)
    sizes: list[tuple[int, int]] = []
    for path in pictures[::step][:MEASURED]:
        try:
            with Image.open(root / path) as image:
                sizes.append(image.size)
        except DAMAGED:
            continue
    return sizes


def _resolution(sizes: Sequence[tuple[int, int]]) -> int:
    """Edge of the square of the middle picture's area, in whole steps, at most what the models are native to."""
    if not sizes:
        return NATIVE
    edge = median((width * height) ** 0.5 for width, height in sizes)
    return min(NATIVE, max(STEP, int(edge) // STEP * STEP))


def _identify(folder: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name).strip("-.") or "dataset"
