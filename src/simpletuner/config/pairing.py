"""Which picture belongs to which: by path without extension. training.md §3.6. Pure but for `list_pictures`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from simpletuner.errors import Level, Problem

NAMED = 20
"""Files that a message about pairs names at most."""
MASKS = ("mask", "segmentation")


@dataclass(slots=True)
class Pairing:
    """The mate of each file; those without one, and those with several that fit equally well."""

    mates: dict[str, str] = field(default_factory=dict[str, str])
    missing: list[str] = field(default_factory=list[str])
    ambiguous: dict[str, list[str]] = field(default_factory=dict[str, list[str]])


def pair_files(targets: Iterable[str], candidates: Iterable[str]) -> Pairing:
    """Paths relative to their roots. The mate has the same path without extension; the same extension is preferred."""
    by_stem: dict[str, list[str]] = {}
    for path in candidates:
        by_stem.setdefault(os.path.splitext(path)[0], []).append(path)  # noqa: PTH122 - called once a file
    found = Pairing()
    for path in targets:
        near = by_stem.get(os.path.splitext(path)[0], [])  # noqa: PTH122
        if path in near:
            found.mates[path] = path
        elif len(near) == 1:
            found.mates[path] = near[0]
        elif near:
            found.ambiguous[path] = sorted(near)
        else:
            found.missing.append(path)
    return found


def name_files(paths: Sequence[str]) -> str:
    """The first 20 names, and how many more there are."""
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more


def list_pictures(root: Path) -> list[str]:
    """Paths of the pictures under a folder, by extension alone; hidden ones are skipped, links followed."""
    from simpletuner.config.picture_files import picture_extensions  # Pillow takes 50 ms, and most have no pairs

    extensions = picture_extensions()
    found: list[str] = []
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else [name for name in below if not name.startswith(".")]
        if real in seen:
            continue
        seen.add(real)
        prefix = "" if folder == str(root) else os.path.relpath(folder, root) + "/"
        wanted = (name for name in names if not name.startswith("."))
        found += [prefix + name for name in wanted if Path(name).suffix.lower() in extensions]
    return sorted(found)


def check_pairs(datasets: Sequence[Mapping[str, Any]], pointers: Sequence[str]) -> Iterator[Problem]:
    """Links between entries, and, as warnings, files without a mate; a folder that does not exist is left out."""
    sets = {row["id"]: row for row in datasets if row["dataset_type"] == "conditioning" and not row["disabled"]}
    used: set[str] = set()
    listed: dict[str, list[str]] = {}
    for pointer, row in zip(pointers, datasets, strict=True):
        if row["disabled"] or not row.get("conditioning_data"):
            continue
        used.update(row["conditioning_data"])
        place = f"{pointer}/conditioning_data"
        problems = list(_check_links(row, sets, datasets, place))
        yield from problems
        for name in [] if problems else row["conditioning_data"]:
            yield from _check_files(row, sets[name], place, listed)
    for pointer, row in zip(pointers, datasets, strict=True):
        if row["id"] in sets and row["id"] not in used:
            yield Problem(
                code="option_no_effect",
                message=f"The conditioning set {row['id']!r} has no effect: no dataset names it.",
                hint=f'Write "conditioning_data": "{row["id"]}" in the dataset that it belongs to.',
                pointer=pointer,
                level=Level.WARNING,
            )


def _check_links(
    row: Mapping[str, Any], sets: Mapping[str, Any], datasets: Sequence[Mapping[str, Any]], place: str
) -> Iterator[Problem]:
    names: list[str] = row["conditioning_data"]
    for name in names:
        if name in sets:
            continue
        other = next((entry for entry in datasets if entry["id"] == name), None)
        near = get_close_matches(name, list(sets), n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        reason = "does not exist" if other is None else "is disabled" if other["disabled"] else "is no conditioning set"
        yield Problem(
            code="unknown_conditioning",
            message=f"{row['id']!r} is conditioned on {name!r}, which {reason}.",
            hint=f"{guess}Conditioning sets: {', '.join(sets) or 'none'}.",
            pointer=place,
        )
    masks = [name for name in names if name in sets and sets[name]["conditioning_type"] in MASKS]
    if len(masks) > 1 or len(set(names)) < len(names):
        message = f"{row['id']!r} names a conditioning set twice."
        if len(masks) > 1:
            message = f"{row['id']!r} has several masks: {', '.join(masks)}."
        hint = "A dataset has at most one mask or segmentation set, and each set once."
        yield Problem(code="bad_conditioning", message=message, hint=hint, pointer=place)


def _check_files(
    row: Mapping[str, Any], mates: Mapping[str, Any], place: str, listed: dict[str, list[str]]
) -> Iterator[Problem]:
    roots = [entry["instance_data_dir"] for entry in (row, mates)]
    if not all(root is not None and Path(root).is_dir() for root in roots):
        return
    for root in roots:
        if root not in listed:
            listed[root] = list_pictures(Path(root))
    found = pair_files(listed[roots[0]], listed[roots[1]])
    about = f"of {row['id']!r} in {mates['id']!r}"
    if found.missing:
        message = f"{len(found.missing)} picture(s) {about} have no mate: {name_files(found.missing)}."
        hint = "A mate has the same path under its root, without the extension."
        yield Problem(code="pair_missing", message=message, hint=hint, pointer=place, level=Level.WARNING)
    if found.ambiguous:
        names = [f"{path} ({' or '.join(near)})" for path, near in found.ambiguous.items()]
        message = f"{len(names)} picture(s) {about} have several mates: {name_files(names)}."
        hint = "Keep one file of each name."
        yield Problem(code="pair_ambiguous", message=message, hint=hint, pointer=place, level=Level.WARNING)
