"""What Pillow opens, and how its format plugins fail."""

from __future__ import annotations

import struct

from PIL import Image

# A file may be damaged in any way, and each plugin raises what it likes.
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, TypeError, ArithmeticError,
    Image.DecompressionBombError,
)  # fmt: skip


def picture_extensions() -> frozenset[str]:
    """Lower-case extensions, with the dot, of all formats that Pillow can open."""
    extensions = Image.registered_extensions()
    return frozenset(extension for extension, format in extensions.items() if format in Image.OPEN)
