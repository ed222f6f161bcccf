"""From a picture's size to the pixels that are trained on. Pure, exact, torch-free. training.md §3.3 and §3.4.

W×H is always upright (after EXIF). Square roots and ratios are compared and rounded as integers, so that a size never
depends on a last floating-point digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from math import isqrt, sqrt

from simpletuner.config.dataset_options import PictureDataset
from simpletuner.data.keys import digest, u

Size = tuple[int, int]
"""(width, height) in pixels."""


class DropReason(StrEnum):
    """Why a file is not trained on: by choice of the dataset's options, or because it is defective. §3.9."""

    TOO_SMALL = "too_small"
    ASPECT_OUT_OF_RANGE = "aspect_out_of_range"
    NOT_IN_SUBSET = "not_in_subset"
    TOO_MUCH_UPSCALE = "too_much_upscale"
    UNREADABLE = "unreadable"
    CAPTION_MISSING = "caption_missing"
    CAPTION_UNREADABLE = "caption_unreadable"

    @property
    def is_defect(self) -> bool:
        return self in (DropReason.UNREADABLE, DropReason.CAPTION_MISSING, DropReason.CAPTION_UNREADABLE)


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


def bucket_name(target: Size) -> str:
    """`1.54 (1280x832)`: how a bucket is shown."""
    width, height = target
    return f"{round(width / height, 2)} ({width}x{height})"


def plan_resize(
    width: int, height: int, *, stem: str, dataset: PictureDataset, alignment: int, cycle: int = 0
) -> ResizePlan | DropReason:
    """The plan of one picture, or the choice that drops it.

    `stem` is its file name without folder and extension, `cycle` numbers its crop. Nothing else moves a crop.
    """
    source = (width, height)
    if _is_too_small(source, dataset):
        return DropReason.TOO_SMALL
    aspect = width / height
    if aspect < (dataset.minimum_aspect_ratio or 0) or aspect > (dataset.maximum_aspect_ratio or aspect):
        return DropReason.ASPECT_OUT_OF_RANGE
    if not dataset.crop:
        return _plan_whole(source, dataset, alignment)
    barred = None if dataset.max_upscale_threshold is None else (1 + Fraction(str(dataset.max_upscale_threshold))) ** 2
    choices: list[tuple[float, Size, Fraction]] = []
    for choice in _crop_aspects(source, dataset):
        target = _target(choice, dataset, alignment)
        scale = _scale_squared(source, target, dataset)
        if barred is None or scale <= barred:
            choices.append((choice, target, scale))
    if not choices:
        return DropReason.TOO_MUCH_UPSCALE
    aspects = [choice for choice, _, _ in choices]
    _, target, scale = choices[_choose_aspect(aspects, source, dataset, stem, cycle)]
    resized = (
        max(target[0], _rounded_sqrt(width * width * scale)),
        max(target[1], _rounded_sqrt(height * height * scale)),
    )
    left, top = _crop_corner(resized, target, dataset, stem, cycle)
    box = (left, top, left + target[0], top + target[1])
    return ResizePlan(source, resized, box, target, upscale=sqrt(scale))


def _plan_whole(source: Size, dataset: PictureDataset, alignment: int) -> ResizePlan | DropReason:
    target = _target(source[0] / source[1], dataset, alignment)
    upscale = max(target[0] / source[0], target[1] / source[1])
    if dataset.max_upscale_threshold is not None and upscale > 1 + dataset.max_upscale_threshold:
        return DropReason.TOO_MUCH_UPSCALE
    stretch = target[0] * source[1] / (target[1] * source[0])
    return ResizePlan(source, target, (0, 0, *target), target, upscale, stretch)


def _is_square_crop(dataset: PictureDataset) -> bool:
    return dataset.crop and dataset.crop_aspect == "square"


def _area(size: float, dataset: PictureDataset) -> Fraction:
    """Square pixels that an `area` (megapixels) or `pixel_area` (edge) option stands for."""
    exact = Fraction(str(size))
    return exact * 1_000_000 if dataset.resolution_type == "area" else exact * exact


def _is_too_small(source: Size, dataset: PictureDataset) -> bool:
    if dataset.minimum_image_size is None:
        return False
    if dataset.resolution_type == "pixel":
        return min(source) < dataset.minimum_image_size
    least = _area(dataset.minimum_image_size, dataset)
    return source[0] * source[1] < least or (_is_square_crop(dataset) and min(source) < isqrt(int(least)))


def _target(aspect: float, dataset: PictureDataset, alignment: int) -> Size:
    """Size that a picture of this width ÷ height is brought to: one of few, a bucket."""
    digits = dataset.aspect_bucket_rounding
    ratio = Fraction(str(1.0 if _is_square_crop(dataset) else round(max(aspect, 1 / aspect), digits)))
    if dataset.resolution_type == "pixel":
        edge = Fraction(str(dataset.resolution))
        long, short = _align(edge * ratio, alignment), _align(edge, alignment)
    else:
        edge = _align_sqrt(_area(dataset.resolution, dataset), alignment)
        long, short = _align_sqrt(edge * edge * ratio, alignment), _align_sqrt(edge * edge / ratio, alignment)
    return (long, short) if aspect >= 1 else (short, long)


def _align(x: Fraction, alignment: int) -> int:
    """al(x): the nearest multiple, halves up, at least one."""
    return alignment * max(1, int(x / alignment + Fraction(1, 2)))


def _align_sqrt(x: Fraction, alignment: int) -> int:
    """al(√x)."""
    return alignment * max(1, _rounded_sqrt(x / (alignment * alignment)))


def _rounded_sqrt(x: Fraction) -> int:
    """⌊√x + ½⌋."""
    return (isqrt(int(4 * x)) + 1) // 2


def _scale_squared(source: Size, target: Size, dataset: PictureDataset) -> Fraction:
    """s² of §3.3; squared because s itself can be irrational."""
    width, height = source
    cover = max(Fraction(target[0], width), Fraction(target[1], height)) ** 2
    if dataset.maximum_image_size is None:
        return cover
    if dataset.resolution_type == "pixel":
        size, limit = Fraction(min(source)) ** 2, Fraction(str(dataset.maximum_image_size)) ** 2
    else:
        size, limit = Fraction(width * height), _area(dataset.maximum_image_size, dataset)
    if size <= limit:
        return max(cover, Fraction(1))
    if dataset.target_downsample_size is None:
        return cover
    if dataset.resolution_type == "pixel":
        return max(cover, Fraction(str(dataset.target_downsample_size)) ** 2 / size)
    return max(cover, _area(dataset.target_downsample_size, dataset) / size)


def _crop_aspects(source: Size, dataset: PictureDataset) -> list[float]:
    if dataset.crop_aspect == "square":
        return [1.0]
    if dataset.crop_aspect == "preserve" or not dataset.crop_aspect_buckets:
        return [source[0] / source[1]]
    return dataset.crop_aspect_buckets


def _choose_aspect(aspects: list[float], source: Size, dataset: PictureDataset, stem: str, cycle: int) -> int:
    """Index of the cut's aspect. An aspect weighs the share of the picture that cutting to it keeps."""
    own = source[0] / source[1]
    weights = [min(own / aspect, aspect / own) for aspect in aspects]
    if dataset.crop_aspect != "random":
        return weights.index(max(weights))
    threshold = u("aspect", stem, cycle) * sum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    return len(weights) - 1


def _crop_corner(resized: Size, target: Size, dataset: PictureDataset, stem: str, cycle: int) -> tuple[int, int]:
    free = (resized[0] - target[0], resized[1] - target[1])
    if dataset.crop_style == "corner":
        return 0, 0
    if dataset.crop_style in ("center", "centre"):
        return free[0] // 2, free[1] // 2
    hashed = digest("crop", stem, cycle)
    left = (int.from_bytes(hashed[:8], "big") * (free[0] + 1)) >> 64
    top = (int.from_bytes(hashed[8:16], "big") * (free[1] + 1)) >> 64
    return left, top
