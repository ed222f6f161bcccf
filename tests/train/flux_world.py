"""The embedded nano Kontext on a few pairs of pictures: what the tests of Flux and of adapters run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tiny_world import TinyWorld

from simpletuner.families.registry import load_spec

NANO = Path(load_spec("flux").flavours["nano"].repository)
KONTEXT: dict[str, Any] = {
    "model_family": "flux",
    "model_flavour": "nano",
    "model_type": "lora",
    "pretrained_model_name_or_path": str(NANO),
    "data_backend_config": "data.json",
    "lora_rank": 4,
}


def paired_world(root: Path) -> TinyWorld:
    """Grey pictures that are to be made from coloured ones of the same names."""
    world = TinyWorld(root, NANO, sizes=((64, 64),))
    grey = root / "grey"
    grey.mkdir()
    for path in sorted(world.pictures.iterdir()):
        ImageOps.grayscale(Image.open(path)).convert("RGB").save(grey / path.name)
    world.entries = [
        {"id": "edit", "instance_data_dir": "grey", "resolution": 64, "conditioning_data": ["reference"],
         "crop": True, "crop_style": "random"},
        {"id": "reference", "dataset_type": "conditioning", "conditioning_type": "reference_strict",
         "instance_data_dir": "pictures", "resolution": 64},
    ]  # fmt: skip
    return world
