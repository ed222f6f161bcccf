"""Small pictures and datasets for the tests of the data package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simpletuner.config.dataset_options import ImageDataset
from simpletuner.data.keys import key_seed
from simpletuner.data.manifest import Manifest, discover


def paint(path: Path, width: int = 96, height: int = 64, **save: Any) -> Path:
    """A picture that differs from every other of another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(key_seed(path.name))
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, **save)
    return path


def image_set(folder: Path, **keys: Any) -> ImageDataset:
    defaults: dict[str, Any] = {
        "id": "set",
        "resolution": 64,
        "crop": True,
        "cache_dir_vae": str(folder.parent / "vae"),
    }
    return ImageDataset(instance_data_dir=str(folder), **defaults | keys)


def manifest_of(folder: Path, alignment: int = 8, **keys: Any) -> Manifest:
    dataset = image_set(folder, **keys)
    return discover(dataset, alignment=alignment, cache_dir=Path(dataset.cache_dir_vae))
