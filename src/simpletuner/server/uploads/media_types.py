"""Which files a dataset may hold, by name and by content."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import Image

from simpletuner.config.picture_files import DAMAGED, picture_extensions

Kind = Literal["image", "video", "audio", "text", "table"]

# They are drawn by another program, or Pillow only knows their names.
NOT_PICTURES = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF", "IPTC", "GBR", "FTEX"})
VIDEO = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"})
AUDIO = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"})
TEXT = frozenset({".txt", ".json", ".jsonl", ".csv"})
TABLE = frozenset({".parquet"})
ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
RAW = frozenset({".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".rw2", ".orf"})
JUNK = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
HEAD_BYTES = 4096
TEXT_BYTES = 64 << 10
ISO_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one file is not taken. `code` is stable."""

    code: str
    reason: str
    hint: str = ""


@cache
def image_extensions() -> frozenset[str]:
    formats = Image.registered_extensions()
    return frozenset(extension for extension in picture_extensions() if formats[extension] not in NOT_PICTURES)


def kind_of(name: str) -> Kind | None:
    """By extension alone; None for what no dataset holds."""
    extension = Path(name).suffix.lower()
    if extension in image_extensions():
        return "image"
    kinds: tuple[tuple[frozenset[str], Kind], ...] = (
        (VIDEO, "video"),
        (AUDIO, "audio"),
        (TEXT, "text"),
        (TABLE, "table"),
    )
    return next((kind for extensions, kind in kinds if extension in extensions), None)


def is_junk(name: str) -> bool:
    """What file managers leave behind, and hidden files, which the trainer does not read."""
    return any((part.startswith(".") and part not in {".", ".."}) or part.lower() in JUNK for part in name.split("/"))


def refuse_by_name(name: str) -> Refusal | None:
    """None for a name of an allowed type."""
    if kind_of(name) is not None:
        return None
    extension = Path(name).suffix.lower()
    if extension in {".heic", ".heif"}:
        hint = "Convert it to JPEG or PNG first, for example with `heif-convert`."
    elif extension in RAW:
        hint = "Develop it to TIFF, PNG or JPEG first."
    elif extension in {".svg", ".pdf", ".eps", ".ps"}:
        hint = "Draw it as PNG first."
    elif extension in ARCHIVES:
        hint = "POST a .zip to /api/datasets/upload/zip; other archives have to be repacked."
    elif extension == ".caption":
        hint = "Rename it: a caption file ends in .txt."
    else:
        hint = "Datasets hold images, video, audio, .txt, .json, .jsonl, .csv and .parquet."
    return Refusal("unsupported_type", f"files of type {extension or '(none)'} are not taken", hint)


def refuse_by_content(path: Path, name: str) -> Refusal | None:
    """`path` holds the bytes of the file that is called `name`. Raises OSError."""
    kind = kind_of(name)
    if kind == "image":
        return _refuse_picture(path)
    with path.open("rb") as file:
        head = file.read(TEXT_BYTES if kind == "text" else HEAD_BYTES)
        if kind == "table":
            file.seek(-min(4, len(head)), os.SEEK_END)
            is_right = head[:4] == b"PAR1" == file.read(4)
        elif kind == "text":
            return _refuse_text(head)
        else:
            is_right = _is_video(head) if kind == "video" else _is_audio(head)
    if is_right:
        return None
    return Refusal(
        "disguised_file", f"its content is not what {Path(name).suffix.lower()} says", "Rename or remove it."
    )


def _refuse_picture(path: Path) -> Refusal | None:
    formats = [format for format in Image.OPEN if format not in NOT_PICTURES]
    try:
        with Image.open(path, formats=formats) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return Refusal("picture_too_large", f"it has more than {most} megapixels", "Make it smaller first.")
    except DAMAGED:
        return Refusal("disguised_file", "it is no picture that Pillow knows", "Replace or remove it.")
    return None if width and height else Refusal("disguised_file", "it has no pixels", "Replace or remove it.")


def _refuse_text(head: bytes) -> Refusal | None:
    if b"\0" not in head and not head.startswith((b"MZ\x90", b"\x7fELF", b"%PDF")):
        return None
    return Refusal("disguised_file", "it is not text", "Save it as UTF-8 text, or remove it.")


def _is_video(head: bytes) -> bool:
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    return head[4:8] in ISO_BOXES or head[:4] == b"\x1aE\xdf\xa3" or is_avi


def _is_audio(head: bytes) -> bool:
    is_wave = head[:4] in {b"RIFF", b"RF64"} and head[8:12] == b"WAVE"
    is_mpeg = head[:3] == b"ID3" or (head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE0 == 0xE0)
    return is_wave or is_mpeg or head[:4] in {b"fLaC", b"OggS"} or head[4:8] == b"ftyp"
