"""Pixels: what §3.2 asks of every format."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from simpletuner.data.geometry import ResizePlan
from simpletuner.data.media import UnreadablePicture, decode_picture, read_size


def whole(width: int, height: int) -> ResizePlan:
    size = (width, height)
    return ResizePlan(size, size, (0, 0, width, height), size, 1.0)


def saved(image: Image.Image, format: str = "PNG", **keys: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **keys)
    return buffer.getvalue()


def corners() -> Image.Image:
    """2×3 blocks: red left top, green right top, the rest blue."""
    image = Image.new("RGB", (16, 24), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    image.paste((0, 255, 0), (8, 0, 16, 8))
    return image


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(format: str, orientation: int) -> None:
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of what a reader does
    image = corners()
    if orientation > 1:
        image = image.transpose(Image.Transpose(turned[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    keys: dict[str, Any] = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    content = saved(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else keys))
    assert read_size(BytesIO(content)) == (16, 24)
    pixels = decode_picture(content, whole(16, 24)).astype(int)
    assert np.abs(pixels - np.asarray(corners()).astype(int)).max() < 12


def test_alpha_over_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    pixels = decode_picture(saved(Image.fromarray(rgba)), whole(2, 2))
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[1, 1].tolist() == [255, 255, 255]
    assert abs(int(pixels[0, 1, 0]) - 127) <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    pixels = decode_picture(saved(palette, transparency=0), whole(2, 1))
    assert pixels.tolist() == [[[255, 255, 255], [40, 50, 60]]]
    grey = Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA")
    assert decode_picture(saved(grey), whole(2, 1)).tolist() == [[[9] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("values", "format", "expected"),
    [
        (np.array([[0, 32768, 65535]], np.uint16), "PNG", [0, 128, 255]),
        (np.array([[0, 32768, 65535]], np.uint16), "TIFF", [0, 128, 255]),
        (np.array([[0, 128, 255]], np.int32), "TIFF", [0, 128, 255]),
        (np.array([[0, 0.5, 1.0]], np.float32), "TIFF", [0, 128, 255]),
    ],
)
def test_deep_grey(values: Any, format: str, expected: list[int]) -> None:
    pixels = decode_picture(saved(Image.fromarray(values), format), whole(3, 1))
    assert pixels[0, :, 0].tolist() == expected and (pixels == pixels[..., :1]).all()


def test_first_frame() -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for format in ("GIF", "WEBP", "PNG"):
        keys: dict[str, Any] = {"save_all": True, "append_images": [blue]} | (
            {"lossless": True} if format == "WEBP" else {}
        )
        assert decode_picture(saved(red, format, **keys), whole(8, 8))[0, 0].tolist() == [255, 0, 0], format


def test_other_colour_spaces() -> None:
    for mode, white in (("1", 1), ("L", 255), ("CMYK", (0, 0, 0, 0))):
        pixels = decode_picture(saved(Image.new(mode, (4, 4), white), "TIFF"), whole(4, 4))
        assert pixels.shape == (4, 4, 3) and pixels.min() == 255
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    assert decode_picture(saved(image, icc_profile=srgb), whole(4, 4))[0, 0].tolist() == [200, 100, 50]
    assert decode_picture(saved(image, icc_profile=b"junk"), whole(4, 4))[0, 0].tolist() == [200, 100, 50]


def test_profile_is_applied() -> None:
    # A sRGB profile with the red and green primaries' tags swapped in its table: red pixels become green.
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red], profile[green] = profile[green], profile[red]
    for name in (b"sRGB built-in", "sRGB built-in".encode("utf-16-be")):
        where = profile.find(name)
        if where >= 0:
            profile[where : where + len(name)] = name.replace(b"s", b"x")
    pixels = decode_picture(saved(Image.new("RGB", (4, 4), (255, 0, 0)), icc_profile=bytes(profile)), whole(4, 4))
    assert pixels[0, 0, 1] > 250 and pixels[0, 0, 0] < 5


def test_resize_and_box() -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    plan = ResizePlan((200, 100), (100, 50), (30, 10, 70, 50), (40, 40), 0.5)
    pixels = decode_picture(saved(Image.fromarray(np.ascontiguousarray(ramp))), plan)
    assert pixels.shape == (40, 40, 3) and pixels.dtype == np.uint8
    assert abs(int(pixels[0, 0, 0]) - 60) <= 1 and abs(int(pixels[0, 39, 0]) - 138) <= 1


def test_broken_pictures() -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    for format in ("JPEG", "PNG", "WEBP", "TIFF", "BMP"):
        content = saved(image, format)
        with pytest.raises(UnreadablePicture):
            decode_picture(content[: len(content) // 2], whole(64, 64))
    with pytest.raises(UnreadablePicture, match="not a picture"):
        read_size(BytesIO(b"text"))
    with pytest.raises(UnreadablePicture, match="its size is"):
        decode_picture(saved(image), whole(32, 32))
