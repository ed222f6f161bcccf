"""Mates of a dataset's pictures: whose, and cut how. training.md §3.6. Torch-free.

The mates from one conditioning set are a manifest whose row n belongs to row n of the target's: encoding and reading
them is the same work as for any pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from simpletuner.config.dataset_options import TargetDataset
from simpletuner.config.pairing import Pairing, pair_files
from simpletuner.data.geometry import DropReason, ResizePlan, Size
from simpletuner.data.manifest import CaptionColumn, Manifest
from simpletuner.data.text_column import TextColumn

_Defects = dict[int, tuple[DropReason, str]]


def strict_plan(target: ResizePlan, source: Size) -> ResizePlan | None:
    """The target's cut applied to a picture of another size; None where the aspects differ by more than 1 %."""
    crosses = (source[0] * target.source[1], target.source[0] * source[1])
    if 100 * max(crosses) > 101 * min(crosses):
        return None
    upscale = max(target.resized[0] / source[0], target.resized[1] / source[1])
    stretch = target.resized[0] * source[1] / (target.resized[1] * source[0])
    return replace(target, source=source, upscale=upscale, stretch=stretch)


def pair(target: Manifest, conditioning: Mapping[str, Manifest]) -> Manifest:
    """`target` with its mates. A row that lacks one, or whose mate cannot be used, is dropped with the reason."""
    dataset = target.dataset
    names = dataset.conditioning_data if isinstance(dataset, TargetDataset) else []
    mates: list[Manifest] = []
    defects: _Defects = {}
    for name in names:
        aligned, lacking = _align(target, conditioning[name])
        mates.append(aligned)
        defects = lacking | defects
    unused: _Defects = dict.fromkeys(defects, (DropReason.UNPAIRED, ""))
    return replace(target, mates=tuple(found.drop(unused) for found in mates)).drop(defects)


def mark_unpaired(conditioning: Manifest, targets: Sequence[Manifest]) -> Manifest:
    """The set itself, for its ledger: what belongs to no picture is left out, by choice and not as a defect."""
    id = conditioning.dataset.id
    used = {path for target in targets for mates in target.mates if mates.dataset.id == id for path in mates.paths}
    rows = [row for row in conditioning.kept.tolist() if conditioning.paths[row] not in used]
    return conditioning.drop(dict.fromkeys(rows, (DropReason.UNPAIRED, "it belongs to no picture")))


def pair_all(manifests: Sequence[Manifest]) -> list[Manifest]:
    """The same in the same order: targets with their mates, conditioning sets with what belongs to no picture."""
    conditioning = {found.dataset.id: found for found in manifests if not _is_target(found)}
    paired = {found.dataset.id: pair(found, conditioning) for found in manifests if _is_target(found)}
    targets = list(paired.values())
    return [paired[found.dataset.id] if _is_target(found) else mark_unpaired(found, targets) for found in manifests]


def targets_of(manifests: Sequence[Manifest]) -> list[Manifest]:
    """Those whose defects stop a run: a defect of a mate is one of its picture."""
    return [found for found in manifests if _is_target(found)]


def _is_target(manifest: Manifest) -> bool:
    return manifest.kind == "latents"


def _align(target: Manifest, source: Manifest) -> tuple[Manifest, _Defects]:
    """Rows of `source` in the order of `target`'s; rows without a mate are empty."""
    pairing = pair_files(target.paths, source.paths)
    row_of = {path: row for row, path in enumerate(source.paths)}
    geometry = np.zeros((len(target), 8), np.int32)
    scales = np.zeros((len(target), 2), np.float64)
    contents = np.zeros((len(target), 32), np.uint8)
    num_bytes = np.zeros(len(target), np.int64)
    paths = [pairing.mates.get(path, "") for path in target.paths]
    reasons: list[DropReason | None] = [DropReason.UNPAIRED] * len(target)
    defects: _Defects = {}
    for row in target.kept.tolist():
        mate = row_of.get(paths[row])
        plan = _unpaired(target, source, row, pairing) if mate is None else _plan(target, source, row, mate)
        if mate is None or not isinstance(plan, ResizePlan):
            assert not isinstance(plan, ResizePlan)
            defects[row] = plan
            continue
        geometry[row] = (*plan.source, *plan.resized, *plan.box[:2], *plan.target)
        scales[row] = (plan.upscale, plan.stretch)
        contents[row], num_bytes[row], reasons[row] = source.contents[mate], source.num_bytes[mate], None
    captions = CaptionColumn(TextColumn(), np.zeros(len(target) + 1, np.int64), np.zeros(0, np.int32))
    columns = (TextColumn(paths), num_bytes, reasons, {}, geometry, scales, contents, captions)
    return Manifest(source.dataset, source.backend, *columns), defects


def _unpaired(target: Manifest, source: Manifest, row: int, pairing: Pairing) -> tuple[DropReason, str]:
    path, where = target.paths[row], f"in the conditioning set {source.dataset.id!r}"
    if several := pairing.ambiguous.get(path):
        return DropReason.PAIR_AMBIGUOUS, f"{path} has several mates {where}: {', '.join(several)}"
    return DropReason.PAIR_MISSING, f"{path} has no mate {where}"


def _plan(target: Manifest, source: Manifest, row: int, mate: int) -> ResizePlan | tuple[DropReason, str]:
    path, where = target.paths[row], f"its mate {source.paths[mate]} in {source.dataset.id!r}"
    if source.reasons[mate] is not None:
        return DropReason.UNREADABLE, f"{path}: {where} cannot be used: {source.details.get(mate, '')}"
    if source.is_loose:
        return source.plan(mate)
    own = target.plan(row)
    size: NDArray[np.int32] = source.geometry[mate, :2]
    plan = strict_plan(own, (int(size[0]), int(size[1])))
    if plan is not None:
        return plan
    sizes = f"{own.source[0]}x{own.source[1]} and {size[0]}x{size[1]}"
    return DropReason.PAIR_ASPECT, f"{path} and {where} differ by more than 1 % in aspect ({sizes})"
