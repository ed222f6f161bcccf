"""The output folder's disk: whether it can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from simpletuner.errors import ExitCode, UserError


def make_output_dir(folder: Path) -> None:
    """Raises UserError `output_dir_not_writable` (73)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            "output_dir_not_writable",
            f"The output folder {folder} cannot be written: {error.strerror}.",
            hint="Choose another --output_dir or change its rights.",
            pointer="/--output_dir",
            exit_code=ExitCode.STORAGE,
        ) from error
