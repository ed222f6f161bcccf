"""Pictures: their size from the header alone, and their pixels. training.md §3.2. Torch-free."""

from __future__ import annotations

from io import BytesIO
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from simpletuner.config.picture_files import DAMAGED
from simpletuner.data.geometry import ResizePlan, Size

DECODING = "pixels-1"
"""Version of `decode_picture`; part of the cache key. A change that moves pixels raises it."""

Pixels = NDArray[np.uint8]
"""HWC, RGB."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadablePicture(Exception):
    """The file is not a whole picture; the text says what Pillow found."""


def read_size(file: IO[bytes]) -> Size:
    """Upright (width, height) from the header; nothing is decoded. Raises UnreadablePicture."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            turned = _orientation(image) >= 5
    except DAMAGED as error:
        raise UnreadablePicture(_reason(error)) from error
    if width < 1 or height < 1:
        raise UnreadablePicture(f"its size is {width}x{height}")
    return (height, width) if turned else (width, height)


def find_extension(file: IO[bytes]) -> str:
    """That of the format, with the dot; empty where it is no picture."""
    try:
        with Image.open(file) as image:
            kind = image.format or ""
    except DAMAGED:
        return ""
    extensions = [extension for extension, format in Image.registered_extensions().items() if format == kind]
    return f".{kind.lower()}" if f".{kind.lower()}" in extensions else next(iter(extensions), "")


def decode_picture(content: bytes, plan: ResizePlan) -> Pixels:
    """The pixels of `plan.target`: upright, first frame, alpha over white, 8-bit sRGB, Lanczos.

    Raises UnreadablePicture, also where the size is not the one that was planned for.
    """
    try:
        with Image.open(BytesIO(content)) as image:
            orientation = _orientation(image)
            image.load()
            picture = _rgb(image)
    except DAMAGED as error:
        raise UnreadablePicture(_reason(error)) from error
    if orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[orientation])
    if picture.size != plan.source:
        raise UnreadablePicture(f"its size is {picture.size}, not {plan.source} as its header says")
    if picture.size != plan.resized:
        picture = picture.resize(plan.resized, Image.Resampling.LANCZOS)
    if plan.resized != plan.target:
        picture = picture.crop(plan.box)
    return np.asarray(picture)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Asked before decoding, so that scan and decode agree."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and their size
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole picture to look for a chunk behind the pixels
    value: object = image.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB, alpha over white."""
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return Image.fromarray(_eight_bit(np.asarray(image))).convert("RGB")
    if not image.has_transparency_data:
        return _to_srgb(image)
    layered = image.convert("RGBA")
    flat = Image.new("RGB", image.size, (255, 255, 255))
    colours = layered.convert("RGB")
    colours.info = image.info
    flat.paste(_to_srgb(colours), mask=layered.getchannel("A"))
    return flat


def _eight_bit(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey of 16 or 32 bits, or floats: floats up to 1 and integers up to 65535 fill the range."""
    wide = values.astype(np.float64)
    top = float(wide.max(initial=0.0))
    if values.dtype.kind == "f":
        full = 1 if top <= 1 else 255
    else:
        full = 255 if values.dtype.itemsize > 2 and top <= 255 else 65535
    return np.clip(np.rint(wide * (255 / full)), 0, 255).astype(np.uint8)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply the embedded colour profile; one that does not fit its picture is left out, as viewers do."""
    profile: bytes | None = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "L", "CMYK"):
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB")
    return converted or image.convert("RGB")


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))  # pyright: ignore


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    # Pillow names the in-memory stream, which says nothing to a person.
    return "not a picture that Pillow knows" if "cannot identify image" in text else text or type(error).__name__
