"""All files found of one dataset and what becomes of each, as columns. training.md §3. Torch-free.

A row is a picture found; its number is the *sample* number of the epoch plan. One million rows take about 0.2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from heapq import nlargest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simpletuner.config.dataset_options import ConditioningDataset, PictureDataset
from simpletuner.config.picture_files import picture_extensions
from simpletuner.data.backends import open_backend
from simpletuner.data.captions import CaptionDefect, Captions, Variants, sample_name
from simpletuner.data.geometry import Bucket, DropReason, ResizePlan, ResizeRule, Size
from simpletuner.data.keys import word
from simpletuner.data.media import UnreadablePicture
from simpletuner.data.plan import Members, PlannedSet
from simpletuner.data.scan import Scan
from simpletuner.data.storage import DataBackend, FileStat, split_extension, stem_of
from simpletuner.data.table import CaptionTable, read_table
from simpletuner.data.text_column import TextColumn
from simpletuner.errors import placed

NUM_NEWEST = 3
Tokenizer = Callable[[Sequence[str]], Sequence[tuple[int, bool]]]
"""Captions → (tokens used, whether the caption was cut short) of each."""


@dataclass(frozen=True, slots=True)
class CaptionColumn:
    """Variants of every row; each distinct effective caption is held once."""

    texts: TextColumn
    """Distinct effective captions."""
    starts: NDArray[np.int64]
    """Row n owns `ids[starts[n]:starts[n + 1]]`; length rows + 1."""
    ids: NDArray[np.int32]
    """Places in `texts`."""
    tokens: NDArray[np.int32] | None = None
    """Tokens of each of `texts`, if a tokenizer was given; `truncated` likewise."""
    truncated: NDArray[np.bool_] | None = None

    def of(self, row: int) -> list[int]:
        """Places in `texts` of the row's variants."""
        return self.ids[self.starts[row] : self.starts[row + 1]].tolist()


@dataclass(frozen=True, slots=True)
class Manifest:
    dataset: PictureDataset
    backend: DataBackend
    paths: TextColumn
    num_bytes: NDArray[np.int64]
    reasons: list[DropReason | None]
    """None = kept."""
    details: dict[int, str]
    """What is wrong with a defective row, in words."""
    geometry: NDArray[np.int32]
    """Rows × (source W, H, resized W, H, box left, top, target W, H); zeros where unknown."""
    scales: NDArray[np.float64]
    """Rows × (upscale, stretch)."""
    contents: NDArray[np.uint8]
    """Rows × 32: SHA-256 of the file's bytes, zeros where it is dropped."""
    captions: CaptionColumn
    mates: tuple[Manifest, ...] = ()
    """One per conditioning set, in the order of `conditioning_data`; row n belongs to row n here."""
    newest: tuple[tuple[int, str], ...] = ()
    """The files that changed last, captions too: `(time of change in ns, path)`, the newest first."""
    kept: NDArray[np.int32] = field(init=False)
    """Numbers of the kept rows, ascending."""

    def __post_init__(self) -> None:
        kept = np.asarray([row for row, reason in enumerate(self.reasons) if reason is None], np.int32)
        object.__setattr__(self, "kept", kept)

    def __len__(self) -> int:
        return len(self.paths)

    def changed_since(self, moment: datetime) -> list[str]:
        """Of the files that changed last those that did after `moment`: at most three, the latest first."""
        return [path for mtime_ns, path in self.newest if mtime_ns > moment.timestamp() * 1e9]

    def plan(self, row: int) -> ResizePlan:
        """The stored plan of a row that has one."""
        width, height, resized_w, resized_h, left, top, target_w, target_h = self.geometry[row].tolist()
        upscale, stretch = self.scales[row].tolist()
        box = (left, top, left + target_w, top + target_h)
        return ResizePlan((width, height), (resized_w, resized_h), box, (target_w, target_h), upscale, stretch)

    def target(self, row: int) -> Size | None:
        width, height = self.geometry[row, 6:].tolist()
        return (width, height) if width else None

    def content(self, row: int) -> bytes:
        return self.contents[row].tobytes()

    def sample(self, row: int) -> str:
        """Name of the row in the counter streams."""
        return sample_name(self.dataset.id, self.paths[row])

    @property
    def kind(self) -> str:
        """What is cached of a picture: `latents`, `reference` or `mask`. Part of the cache key."""
        if not isinstance(self.dataset, ConditioningDataset):
            return "latents"
        return "mask" if self.dataset.conditioning_type in ("mask", "segmentation") else "reference"

    @property
    def is_loose(self) -> bool:
        """Whether its pictures have targets of their own."""
        return isinstance(self.dataset, ConditioningDataset) and self.dataset.conditioning_type == "reference_loose"

    def buckets(self) -> dict[Bucket, Members]:
        """Kept rows by target size, and by those of their loose references."""
        loose = [mates.geometry[self.kept, 6:] for mates in self.mates if mates.is_loose]
        sizes = np.concatenate([self.geometry[self.kept, 6:], *loose], axis=1)
        shapes, bucket_of = np.unique(sizes, axis=0, return_inverse=True)
        return {
            tuple(map(int, shape)): self.kept[bucket_of.reshape(-1) == number]
            for number, shape in enumerate(shapes.tolist())
        }

    def planned_set(self) -> PlannedSet:
        return PlannedSet(self.dataset.id, self.buckets(), self.dataset.repeats, self.dataset.probability)

    def effective_captions(self) -> list[str]:
        """Distinct captions of the kept rows: all that must be encoded."""
        used = np.zeros(len(self.captions.texts), np.bool_)
        for row in self.kept.tolist():
            used[self.captions.of(row)] = True
        return [text for text, is_used in zip(self.captions.texts, used.tolist(), strict=True) if is_used]

    def without(self, unreadable: Mapping[int, str]) -> Manifest:
        """The same with rows dropped that turned out to be broken, each with what is wrong."""
        return self.drop({row: (DropReason.UNREADABLE, detail) for row, detail in unreadable.items()})

    def with_entries(self, entries: Mapping[str, PictureDataset]) -> Manifest:
        """The same under other entries, by id, its mates too: such as differ in how they are encoded only."""
        mates = tuple(mate.with_entries(entries) for mate in self.mates)
        return replace(self, dataset=entries[self.dataset.id], mates=mates)

    def drop(self, defects: Mapping[int, tuple[DropReason, str]]) -> Manifest:
        """The same with more rows dropped."""
        if not defects:
            return self
        reasons = [defects[row][0] if row in defects else reason for row, reason in enumerate(self.reasons)]
        return replace(
            self, reasons=reasons, details=self.details | {row: detail for row, (_, detail) in defects.items()}
        )


def discover(
    dataset: PictureDataset,
    *,
    alignment: int,
    cache_dir: Path,
    tokenizer: Tokenizer | None = None,
    backend: DataBackend | None = None,
    pointer: str = "",
) -> Manifest:
    """Scan a dataset and plan each picture, in bytewise order of paths. Decodes nothing.

    `cache_dir` keeps what was learnt of the files, so that an unchanged folder is scanned without opening any.
    Raises UserError where the storage or the caption table cannot be read; `pointer` is the entry's place in errors.
    """
    with placed(pointer):
        return _discover(dataset, alignment, cache_dir, tokenizer, backend)


def _discover(
    dataset: PictureDataset,
    alignment: int,
    cache_dir: Path,
    tokenizer: Tokenizer | None,
    backend: DataBackend | None,
) -> Manifest:
    backend = backend or open_backend(dataset, cache_dir)
    scan = Scan(backend, cache_dir)
    table = read_table(dataset.parquet, backend) if dataset.parquet else None
    extensions = picture_extensions()
    files = [file for file in scan.files if file.defect or split_extension(file.path)[1].lower() in extensions]
    rows = _Rows(dataset, files)
    rows.drop_lost()
    whole = [file for file in files if not file.defect]
    rows.plan(_sizes(scan, whole, table if dataset.metadata_backend == "parquet" else None), alignment)
    rows.take_subset()
    column = table.captions if table else backend.captions
    captions = Captions(dataset, names=scan.names, read_text=scan.text, column=column)
    variants = rows.caption(captions)
    contents = rows.hash(scan)
    scan.remember()
    return Manifest(
        dataset,
        backend,
        TextColumn(file.path for file in files),
        np.asarray([file.num_bytes for file in files], np.int64),
        rows.reasons,
        rows.details,
        rows.geometry,
        rows.scales,
        contents,
        _caption_column(variants, tokenizer),
        newest=tuple(nlargest(NUM_NEWEST, ((file.mtime_ns, file.path) for file in scan.files))),
    )


def _sizes(scan: Scan, files: Sequence[FileStat], table: CaptionTable | None) -> list[Size | UnreadablePicture]:
    """Sizes from the table where it has them, else from the headers."""
    if table is None:
        return scan.sizes(files)
    known = [table.size(file.path) for file in files]
    others = iter(scan.sizes([file for file, size in zip(files, known, strict=True) if size is None]))
    return [next(others) if size is None else size for size in known]


class _Rows:
    """The columns while they are being filled; each step works on the rows that are still kept."""

    def __init__(self, dataset: PictureDataset, files: Sequence[FileStat]) -> None:
        self.dataset = dataset
        self.files = files
        self.reasons: list[DropReason | None] = [None] * len(files)
        self.details: dict[int, str] = {}
        self.geometry = np.zeros((len(files), 8), np.int32)
        self.scales = np.zeros((len(files), 2), np.float64)

    def drop_lost(self) -> None:
        reason = DropReason.DOWNLOAD_FAILED if self.dataset.type == "csv" else DropReason.UNREADABLE
        for row, file in enumerate(self.files):
            if file.defect:
                self._drop(row, reason, f"{file.path}: {file.defect}")

    def plan(self, sizes: Iterable[Size | UnreadablePicture], alignment: int) -> None:
        """`sizes` of the rows that are still kept."""
        rule = ResizeRule(self.dataset, alignment)
        planned: list[int] = []
        geometry: list[tuple[int, ...]] = []
        scales: list[tuple[float, float]] = []
        for row, size in zip(self._kept(), sizes, strict=True):
            if isinstance(size, UnreadablePicture):
                self._drop(row, DropReason.UNREADABLE, f"{self.files[row].path}: {size}")
                continue
            plan = rule.plan(*size, stem_of(self.files[row].path))
            if isinstance(plan, DropReason):
                self.geometry[row, :2] = size
                self.reasons[row] = plan
                continue
            planned.append(row)
            geometry.append((*size, *plan.resized, *plan.box[:2], *plan.target))
            scales.append((plan.upscale, plan.stretch))
        if planned:
            # At once: row by row took longer than all of the planning.
            self.geometry[planned], self.scales[planned] = geometry, scales

    def take_subset(self) -> None:
        """Keep the first n by hash of those that are usable: the same n, wherever the folder lies."""
        limit = self.dataset.max_num_samples
        if limit is None:
            return
        order = sorted(self._kept(), key=lambda row: word("subset", self.dataset.id, self.files[row].path))
        for row in order[limit:]:
            self.reasons[row] = DropReason.NOT_IN_SUBSET

    def caption(self, captions: Captions) -> list[Variants]:
        variants: list[Variants] = [()] * len(self.files)
        for row in self._kept():
            found = captions.of(self.files[row].path)
            if isinstance(found, CaptionDefect):
                self._drop(row, found.reason, found.detail)
            else:
                variants[row] = found
        return variants

    def hash(self, scan: Scan) -> NDArray[np.uint8]:
        contents = np.zeros((len(self.files), 32), np.uint8)
        kept = self._kept()
        found = scan.contents([self.files[row] for row in kept])
        whole = [row for row, content in zip(kept, found, strict=True) if isinstance(content, bytes)]
        joined = b"".join(content for content in found if isinstance(content, bytes))
        contents[whole] = np.frombuffer(joined, np.uint8).reshape(-1, 32)
        for row, content in zip(kept, found, strict=True):
            if not isinstance(content, bytes):
                self._drop(row, DropReason.UNREADABLE, f"{self.files[row].path}: {content}")
        return contents

    def _kept(self) -> list[int]:
        return [row for row, reason in enumerate(self.reasons) if reason is None]

    def _drop(self, row: int, reason: DropReason, detail: str) -> None:
        self.reasons[row] = reason
        self.details[row] = detail


def _caption_column(variants: Sequence[Variants], tokenizer: Tokenizer | None) -> CaptionColumn:
    places: dict[str, int] = {}
    ids = np.asarray([places.setdefault(text, len(places)) for texts in variants for text in texts], np.int32)
    starts = np.zeros(len(variants) + 1, np.int64)
    np.cumsum([len(texts) for texts in variants], out=starts[1:])
    texts = TextColumn(places)
    if tokenizer is None or not texts:
        return CaptionColumn(texts, starts, ids)
    counts = tokenizer(list(places))
    tokens = np.asarray([count for count, _ in counts], np.int32)
    return CaptionColumn(texts, starts, ids, tokens, np.asarray([is_cut for _, is_cut in counts], np.bool_))
