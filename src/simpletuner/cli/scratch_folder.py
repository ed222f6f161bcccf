"""A folder beside the state of this workspace, for runs that are thrown away."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder(state_dir: Path, name: str, *, keep: bool) -> Generator[Path]:
    """Gone at the end, however it ends, unless it is to be kept: then its place is told."""
    root = state_dir / "scratch"
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
    try:
        yield folder
    finally:
        if keep:
            print(f"Kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)
