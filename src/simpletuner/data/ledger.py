"""The ledger: one line per file found, and the rules that stop a run on it. training.md §3.9. Torch-free."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simpletuner.config.storage_options import KEYS_OF_TYPE
from simpletuner.data.captions import caption_source
from simpletuner.data.geometry import DropReason, bucket_name
from simpletuner.data.manifest import Manifest
from simpletuner.errors import ExitCode, Level, Problem, UserError
from simpletuner.job import write_atomic

_NAMED = 20

_MENDS = {
    DropReason.TOO_SMALL: "Lower `minimum_image_size`, or bring larger pictures.",
    DropReason.ASPECT_OUT_OF_RANGE: "Widen `minimum_aspect_ratio` … `maximum_aspect_ratio`.",
    DropReason.NOT_IN_SUBSET: "Raise `max_num_samples`.",
    DropReason.TOO_MUCH_UPSCALE: "Raise `max_upscale_threshold`, or lower `resolution`.",
    DropReason.UNREADABLE: "Replace or remove the broken files.",
    DropReason.DOWNLOAD_FAILED: "Correct the URLs, or remove their lines; what failed is tried again at each start.",
    DropReason.CAPTION_MISSING: "Write the captions, choose another `caption_strategy`, or set `ignore_missing_files`.",
    DropReason.CAPTION_UNREADABLE: "Save the caption files as UTF-8.",
    DropReason.PAIR_MISSING: "Add the files (same path under the root, any extension), or set `ignore_missing_files`.",
    DropReason.PAIR_AMBIGUOUS: "Keep one file of each name.",
    DropReason.PAIR_ASPECT: "Set `conditioning_type` to `reference_loose`, or bring pictures of the same aspect.",
    DropReason.UNPAIRED: "Give the files the paths of the pictures that they belong to.",
}


def ledger_row(manifest: Manifest, row: int) -> dict[str, Any]:
    """What became of one file."""
    reason = manifest.reasons[row]
    target = manifest.target(row)
    source = manifest.geometry[row, :2].tolist()
    captions = manifest.captions
    variants = captions.of(row)
    content = manifest.content(row)
    line: dict[str, Any] = {
        "path": manifest.paths[row],
        "status": "kept" if reason is None else "dropped",
        "reason": reason,
        "source": source if any(source) else None,
        "resized": None, "box": None, "target": None, "bucket": None, "upscale": None, "stretch": None,
        "caption_source": caption_source(manifest.dataset, manifest.paths[row]),
        "caption": captions.texts[variants[0]] if variants else None,
        "variants": len(variants),
        "tokens": None if captions.tokens is None or not variants else int(captions.tokens[variants].max()),
        "truncated": None if captions.truncated is None else bool(captions.truncated[variants].any()),
        "pairs": _pairs(manifest, row),
        "bytes": int(manifest.num_bytes[row]),
        "content_hash": content.hex() if any(content) else None,
    }  # fmt: skip
    if target:
        plan = manifest.plan(row)
        line |= {
            "resized": plan.resized, "box": plan.box, "target": target, "bucket": bucket_name(target),
            "upscale": round(plan.upscale, 4), "stretch": round(plan.stretch, 4),
        }  # fmt: skip
    if manifest.backend.revision is not None:
        line["revision"] = manifest.backend.revision
    if row in manifest.details:
        line["detail"] = manifest.details[row]
    return line


def _pairs(manifest: Manifest, row: int) -> list[dict[str, str]]:
    return [{"dataset": mates.dataset.id, "path": mates.paths[row]} for mates in manifest.mates if mates.paths[row]]


def write_ledger(manifest: Manifest, path: Path) -> None:
    """One JSON line per file found, in the order of their paths."""
    lines = [json.dumps(ledger_row(manifest, row)) for row in range(len(manifest))]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(line + "\n" for line in lines).encode())


def mark_dropped(path: Path, dropped: Collection[str], reason: str) -> None:
    """Say in a ledger that was written what became of some of its files later on."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["path"] in dropped:
            row |= {"status": "dropped", "reason": reason}
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def dataset_report(manifest: Manifest) -> dict[str, Any]:
    """Payload of the notification `dataset_report`: counts, by reason and by bucket."""
    dropped = Counter(str(reason) for reason in manifest.reasons if reason is not None)
    truncated = manifest.captions.truncated
    revision = manifest.backend.revision
    return {
        "id": manifest.dataset.id,
        "found": len(manifest),
        "kept": len(manifest.kept),
        "dropped": dict(sorted(dropped.items())),
        "buckets": {bucket_name(bucket): len(members) for bucket, members in manifest.buckets().items()},
        "truncated": 0 if truncated is None else _count_truncated(manifest),
    } | ({} if revision is None else {"revision": revision})


def _count_truncated(manifest: Manifest) -> int:
    truncated = manifest.captions.truncated
    assert truncated is not None
    return sum(bool(truncated[manifest.captions.of(row)].any()) for row in manifest.kept.tolist())


def check_defects(manifests: Sequence[Manifest], *, ignore_missing_files: bool = False) -> list[Problem]:
    """Warnings about datasets that can be trained on.

    Raises UserError `dataset_empty` or `data_defects` (65), the latter with the first 20 files of each kind.
    """
    for manifest in manifests:
        if not len(manifest.kept):
            raise _empty(manifest)
    errors: list[Problem] = []
    warnings: list[Problem] = []
    num_defects = 0
    for manifest in manifests:
        for reason, rows in _defects(manifest).items():
            few = reason in (DropReason.UNREADABLE, DropReason.DOWNLOAD_FAILED) and len(rows) * 100 <= len(manifest)
            waived = ignore_missing_files and reason not in (DropReason.PAIR_AMBIGUOUS, DropReason.PAIR_ASPECT)
            if few or waived:
                warnings.append(_warning(manifest, reason, rows))
                continue
            num_defects += len(rows)
            errors += [_problem(manifest, reason, manifest.details[row]) for row in rows[:_NAMED]]
        warnings += _stretched(manifest)
    if not errors:
        return warnings
    only_pairs = {problem.code for problem in errors} <= {reason.value for reason in DropReason if reason.is_of_pair}
    raise UserError(
        errors[0].code if only_pairs else "data_defects",
        f"{num_defects} file(s) cannot be trained on; the first: {errors[0].message}",
        hint=errors[0].hint,
        exit_code=ExitCode.DATA,
        problems=errors + warnings,
    )


def _defects(manifest: Manifest) -> dict[DropReason, list[int]]:
    found: dict[DropReason, list[int]] = {}
    for row in sorted(manifest.details):
        reason = manifest.reasons[row]
        if reason is not None and reason.is_defect:
            found.setdefault(reason, []).append(row)
    return found


def _problem(manifest: Manifest, reason: DropReason, detail: str, level: Level = Level.ERROR) -> Problem:
    return Problem(code=reason, message=f"Dataset {manifest.dataset.id!r}: {detail}.", hint=_MENDS[reason], level=level)


def _warning(manifest: Manifest, reason: DropReason, rows: Sequence[int]) -> Problem:
    more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    return _problem(manifest, reason, f"left out: {manifest.details[rows[0]]}{more}", Level.WARNING)


def _stretched(manifest: Manifest) -> list[Problem]:
    """Beyond 10 % a picture visibly changes its shape. A mate that is cut as its target is has that one's warning."""
    if manifest.kind != "latents" and not manifest.is_loose:
        return []
    stretch = manifest.scales[manifest.kept, 1]
    rows = manifest.kept[np.maximum(stretch, 1 / stretch) > 1.1]
    if not len(rows):
        return []
    path = manifest.paths[int(rows[0])]
    return [
        Problem(
            code="stretched",
            message=f"Dataset {manifest.dataset.id!r}: {len(rows)} picture(s) change their aspect by more than 10 %, "
            f"the first: {path}.",
            hint="Set `crop` to cut them to the target.",
            level=Level.WARNING,
        )
    ]


def _where(manifest: Manifest) -> str:
    return "Correct " + " or ".join(f"`{key}`" for key in KEYS_OF_TYPE[manifest.dataset.type][:2]) + "."


def _empty(manifest: Manifest) -> UserError:
    name, place = manifest.dataset.id, manifest.dataset.place
    counts = Counter(reason for reason in manifest.reasons if reason is not None)
    if not counts:
        message, hint = f"Dataset {name!r} is empty: no picture in {place}.", _where(manifest)
    else:
        (reason, count), *_ = counts.most_common(1)
        rows = _defects(manifest).get(reason)
        example = f"; the first: {manifest.details[rows[0]]}" if rows else ""
        message = f"Dataset {name!r} keeps none of its {len(manifest)} picture(s): {count} × {reason}{example}."
        hint = _MENDS[reason]
    return UserError("dataset_empty", message, hint=hint, exit_code=ExitCode.DATA)
