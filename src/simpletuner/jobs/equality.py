"""Whether two runs came to the same: their last checkpoints and all their numbers, byte for byte. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from simpletuner.checkpoints import CheckpointFolder, list_checkpoints
from simpletuner.run_lock import METRICS

_PLACE = ("step", "position", "samples")
_CHUNK_BYTES = 1 << 20
_NOT_COMPARED = ("README.md", "training_state.json")


@dataclass(frozen=True, slots=True)
class Compared:
    """One thing of both runs. `difference`: where they part, empty when they are equal."""

    part: str
    name: str
    difference: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "equal": not self.difference}


def compare_runs(one: Path, other: Path) -> list[Compared]:
    """Of two output folders: every number of every step, then the newest checkpoint file by file."""
    return [_compare_metrics(one, other), *compare_checkpoints(list_checkpoints(one)[0], list_checkpoints(other)[0])]


def compare_checkpoints(one: CheckpointFolder, other: CheckpointFolder) -> Iterator[Compared]:
    """By the hashes of their manifests; only a file that differs is read."""
    places = [{key: folder.read_state()[key] for key in _PLACE} for folder in (one, other)]
    difference = "" if places[0] == places[1] else f"{places[0]} and {places[1]}"
    yield Compared("place in the data", "training_state.json", difference)
    files = [{} if folder.manifest is None else folder.manifest["files"] for folder in (one, other)]
    for name in sorted(files[0].keys() | files[1].keys()):
        if name in _NOT_COMPARED:
            continue
        if name not in files[0] or name not in files[1]:
            yield Compared(_part(name), name, "only one of the runs has it")
        elif files[0][name] == files[1][name]:
            yield Compared(_part(name), name)
        else:
            yield Compared(_part(name), name, _first_difference(one.path / name, other.path / name))


def _compare_metrics(one: Path, other: Path) -> Compared:
    left, right = (_rows(folder) for folder in (one, other))
    if left == right:
        return Compared(f"{len(left)} losses, gradient norms and rates", METRICS)
    pairs = ((a, b) for a, b in zip(left, right, strict=False) if a != b)
    first = next(pairs, None)
    told = f"{len(left)} steps and {len(right)}" if first is None else _parting(*first)
    return Compared("losses, gradient norms and rates", METRICS, told)


def _parting(one: dict[str, Any], other: dict[str, Any]) -> str:
    name = next(name for name in one if one[name] != other.get(name))
    return f"{name} of step {one['step']}: {one[name]!r} and {other.get(name)!r}"


def _rows(output_dir: Path) -> list[dict[str, Any]]:
    """Without what a clock says."""
    rows = [json.loads(line) for line in (output_dir / METRICS).read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def _part(name: str) -> str:
    if name.startswith("optimizer"):
        return "optimizer state"
    if name.startswith("rng"):
        return "generators"
    if not name.endswith(".safetensors"):
        return "description"
    return "moving average" if "ema" in name.split("/")[0].split("_") else "weights"


def _first_difference(one: Path, other: Path) -> str:
    if one.suffix != ".safetensors":
        return "its bytes differ"
    left, right = _tensors(one), _tensors(other)
    with one.open("rb") as a, other.open("rb") as b:
        for name in sorted(left.keys() | right.keys()):
            if name not in left or name not in right or left[name][0] != right[name][0]:
                return f"{name}: not the same type or shape"
            for files in zip(_chunks(a, *left[name][1:]), _chunks(b, *right[name][1:]), strict=True):
                if files[0] != files[1]:
                    return f"{name} is the first tensor that differs"
    return "its header differs, no tensor does"


def _tensors(path: Path) -> dict[str, tuple[str, int, int]]:
    """Name → type and shape, begin and end in the file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: (f"{told['dtype']} {told['shape']}", *(8 + size + offset for offset in told["data_offsets"]))
        for name, told in header.items()
    }


def _chunks(file: Any, begin: int, end: int) -> Iterator[bytes]:
    file.seek(begin)
    for start in range(begin, end, _CHUNK_BYTES):
        yield file.read(min(_CHUNK_BYTES, end - start))
