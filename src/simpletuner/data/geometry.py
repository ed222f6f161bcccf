"""From a picture's size to the pixels that are trained on. Pure, exact, torch-free. training.md §3.3 and §3.4.

W×H is always upright (after EXIF). Square roots and ratios are compared and rounded as integers, so that a size never
depends on a last floating-point digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from math import ceil, isqrt, sqrt
from typing import NamedTuple

from simpletuner.config.dataset_options import PictureDataset
from simpletuner.data.keys import digest, u

Size = tuple[int, int]
"""(width, height) in pixels."""

Bucket = tuple[int, ...]
"""(width, height) of the target; where loose references have sizes of their own, theirs follow in order."""

Ratio = tuple[int, int]
"""Numerator and denominator, not reduced: a Fraction would cost more than all the rest of a plan."""


class DropReason(StrEnum):
    """Why a file is not trained on: by choice of the dataset's options, or because it is defective. §3.9."""

    TOO_SMALL = "too_small"
    ASPECT_OUT_OF_RANGE = "aspect_out_of_range"
    NOT_IN_SUBSET = "not_in_subset"
    TOO_MUCH_UPSCALE = "too_much_upscale"
    UNREADABLE = "unreadable"
    DOWNLOAD_FAILED = "download_failed"
    CAPTION_MISSING = "caption_missing"
    CAPTION_UNREADABLE = "caption_unreadable"
    PAIR_MISSING = "pair_missing"
    PAIR_AMBIGUOUS = "pair_ambiguous"
    PAIR_ASPECT = "pair_aspect"
    UNPAIRED = "unpaired"

    @property
    def is_defect(self) -> bool:
        return self.is_of_pair or self in (
            DropReason.UNREADABLE,
            DropReason.DOWNLOAD_FAILED,
            DropReason.CAPTION_MISSING,
            DropReason.CAPTION_UNREADABLE,
        )

    @property
    def is_of_pair(self) -> bool:
        return self in (DropReason.PAIR_MISSING, DropReason.PAIR_AMBIGUOUS, DropReason.PAIR_ASPECT)


@dataclass(frozen=True, slots=True)
class ResizePlan:
    """What every reader of a picture does to it: resize to `resized`, then cut `box` out."""

    source: Size
    resized: Size
    box: tuple[int, int, int, int]
    """left, top, right, bottom in the resized picture; its size is `target`."""
    target: Size
    upscale: float
    """The one factor s for both axes; of the axis that grows most where the picture is stretched."""
    stretch: float = 1.0
    """Target aspect ÷ source aspect: 1 unless the whole picture is resized to the target."""

    @property
    def transform(self) -> str:
        """All of the plan that decides pixels; part of the cache key."""
        return f"lanczos {self.resized[0]}x{self.resized[1]} box {','.join(map(str, self.box))}"


class _Cut(NamedTuple):
    """A resize plan but for the place of its box."""

    resized: Size
    target: Size
    upscale: float


def bucket_name(bucket: Bucket) -> str:
    """`1.54 (1280x832)`, with `+ 1024x1024` for a loose reference: how a bucket is shown."""
    width, height, *others = bucket
    references = "".join(f" + {w}x{h}" for w, h in zip(others[::2], others[1::2], strict=True))
    return f"{round(width / height, 2)} ({width}x{height}){references}"


def plan_resize(
    width: int, height: int, *, stem: str, dataset: PictureDataset, alignment: int, cycle: int = 0
) -> ResizePlan | DropReason:
    """The plan of one picture, or the choice that drops it.

    `stem` is its file name without folder and extension, `cycle` numbers its crop. Nothing else moves a crop.
    """
    return ResizeRule(dataset, alignment).plan(width, height, stem, cycle)


class ResizeRule:
    """The options of a dataset, made ready to plan many pictures."""

    def __init__(self, dataset: PictureDataset, alignment: int) -> None:
        self._dataset = dataset
        self._alignment = alignment
        self._is_square = dataset.crop and dataset.crop_aspect == "square"
        self._targets: dict[float, Size] = {}
        self._cuts: dict[Size, _Cut | DropReason] = {}
        # In the unit that `_measure` counts in; whole pixels, because measures are.
        least = self._limit(dataset.minimum_image_size) or Fraction(0)
        self._least, self._least_edge = ceil(least), isqrt(int(least))
        limit = self._limit(dataset.maximum_image_size)
        self._most = None if limit is None else int(limit)
        self._downsample = self._limit(dataset.target_downsample_size)
        threshold = dataset.max_upscale_threshold
        self._barred = None if threshold is None else (1 + Fraction(str(threshold))) ** 2

    def plan(self, width: int, height: int, stem: str, cycle: int = 0) -> ResizePlan | DropReason:
        source, dataset = (width, height), self._dataset
        if self._is_too_small(source):
            return DropReason.TOO_SMALL
        aspect = width / height
        if aspect < (dataset.minimum_aspect_ratio or 0) or aspect > (dataset.maximum_aspect_ratio or aspect):
            return DropReason.ASPECT_OUT_OF_RANGE
        if not dataset.crop:
            return self._plan_whole(source)
        cut = self._cut(source, aspect, stem, cycle)
        if isinstance(cut, DropReason):
            return cut
        left, top = self._corner(cut.resized, cut.target, stem, cycle)
        box = (left, top, left + cut.target[0], top + cut.target[1])
        return ResizePlan(source, cut.resized, box, cut.target, cut.upscale)

    def _cut(self, source: Size, aspect: float, stem: str, cycle: int) -> _Cut | DropReason:
        """Remembered by size where the name does not choose: pictures are many, their sizes are few."""
        if self._dataset.crop_aspect == "random":
            return self._plan_cut(source, aspect, stem, cycle)
        if source not in self._cuts:
            self._cuts[source] = self._plan_cut(source, aspect, stem, cycle)
        return self._cuts[source]

    def _plan_cut(self, source: Size, aspect: float, stem: str, cycle: int) -> _Cut | DropReason:
        choices = [(choice, self._target(choice)) for choice in self._crop_aspects(aspect)]
        allowed = [(choice, target) for choice, target in choices if not self._is_barred(source, target)]
        if not allowed:
            return DropReason.TOO_MUCH_UPSCALE
        _, target = allowed[self._choose([choice for choice, _ in allowed], aspect, stem, cycle)]
        scale = self._scale_squared(source, target)
        resized = (max(target[0], _scaled(source[0], scale)), max(target[1], _scaled(source[1], scale)))
        return _Cut(resized, target, sqrt(scale[0] / scale[1]))

    def _plan_whole(self, source: Size) -> ResizePlan | DropReason:
        target = self._target(source[0] / source[1])
        upscale = max(target[0] / source[0], target[1] / source[1])
        threshold = self._dataset.max_upscale_threshold
        if threshold is not None and upscale > 1 + threshold:
            return DropReason.TOO_MUCH_UPSCALE
        stretch = target[0] * source[1] / (target[1] * source[0])
        return ResizePlan(source, target, (0, 0, *target), target, upscale, stretch)

    def _measure(self, source: Size) -> int:
        """Square pixels; of the square on the shorter edge for `pixel`."""
        return min(source) ** 2 if self._dataset.resolution_type == "pixel" else source[0] * source[1]

    def _limit(self, size: float | None) -> Fraction | None:
        """What a size option stands for, in square pixels."""
        if size is None:
            return None
        exact = Fraction(str(size))
        return exact * 1_000_000 if self._dataset.resolution_type == "area" else exact * exact

    def _is_too_small(self, source: Size) -> bool:
        if self._measure(source) < self._least:
            return True
        is_area = self._dataset.resolution_type != "pixel"
        return is_area and self._is_square and min(source) < self._least_edge

    def _target(self, aspect: float) -> Size:
        """Size that a picture of this width ÷ height is brought to: one of few, a bucket."""
        ratio = 1.0 if self._is_square else round(max(aspect, 1 / aspect), self._dataset.aspect_bucket_rounding)
        if ratio not in self._targets:
            self._targets[ratio] = self._long_and_short(Fraction(str(ratio)))
        long, short = self._targets[ratio]
        return (long, short) if aspect >= 1 else (short, long)

    def _long_and_short(self, ratio: Fraction) -> Size:
        size = self._limit(self._dataset.resolution)
        assert size is not None
        edge = _align_sqrt(size, self._alignment)
        if self._dataset.resolution_type == "pixel":
            return _align_sqrt(size * ratio * ratio, self._alignment), edge
        area = edge * edge
        return _align_sqrt(area * ratio, self._alignment), _align_sqrt(area / ratio, self._alignment)

    def _scale_squared(self, source: Size, target: Size) -> Ratio:
        """s² of §3.3; squared because s itself can be irrational."""
        width, height = source
        is_wide = target[0] * height >= target[1] * width
        cover = (target[0] ** 2, width**2) if is_wide else (target[1] ** 2, height**2)
        if self._most is None:
            return cover
        measure = self._measure(source)
        if measure <= self._most:
            return max(cover, (1, 1), key=_value)
        if self._downsample is None:
            return cover
        return max(cover, (self._downsample.numerator, self._downsample.denominator * measure), key=_value)

    def _is_barred(self, source: Size, target: Size) -> bool:
        return self._barred is not None and _value(self._scale_squared(source, target)) > self._barred

    def _crop_aspects(self, own: float) -> list[float]:
        if self._dataset.crop_aspect == "square":
            return [1.0]
        if self._dataset.crop_aspect == "preserve" or not self._dataset.crop_aspect_buckets:
            return [own]
        return self._dataset.crop_aspect_buckets

    def _choose(self, aspects: list[float], own: float, stem: str, cycle: int) -> int:
        """Index of the cut's aspect. An aspect weighs the share of the picture that cutting to it keeps."""
        weights = [min(own / aspect, aspect / own) for aspect in aspects]
        if self._dataset.crop_aspect != "random":
            return weights.index(max(weights))
        threshold = u("aspect", stem, cycle) * sum(weights)
        for index, weight in enumerate(weights):
            threshold -= weight
            if threshold < 0:
                return index
        return len(weights) - 1

    def _corner(self, resized: Size, target: Size, stem: str, cycle: int) -> tuple[int, int]:
        free = (resized[0] - target[0], resized[1] - target[1])
        if self._dataset.crop_style == "corner":
            return 0, 0
        if self._dataset.crop_style in ("center", "centre"):
            return free[0] // 2, free[1] // 2
        hashed = digest("crop", stem, cycle)
        left = (int.from_bytes(hashed[:8], "big") * (free[0] + 1)) >> 64
        top = (int.from_bytes(hashed[8:16], "big") * (free[1] + 1)) >> 64
        return left, top


def _value(ratio: Ratio) -> Fraction:
    return Fraction(*ratio)


def _scaled(side: int, scale_squared: Ratio) -> int:
    """⌊side·s + ½⌋."""
    return (isqrt(4 * side * side * scale_squared[0] // scale_squared[1]) + 1) // 2


def _align_sqrt(x: Fraction, alignment: int) -> int:
    """al(√x): the nearest multiple, halves up, at least one."""
    return alignment * max(1, (isqrt(int(4 * x / (alignment * alignment))) + 1) // 2)
