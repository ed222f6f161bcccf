"""A server with the real trainer, the model that is inside the package, and six pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from control_world import ServerProcess
from PIL import Image

OPTIONS: dict[str, Any] = {
    "model_flavour": "nano",
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 50,
    "checkpoint_step_interval": 10,
    "checkpoints_total_limit": 2,
    "use_ema": True,
    "lr_scheduler": "cosine",
    "validation_disable": True,
    "seed": 5,
}
TERMINAL = {"completed", "failed", "lost"}


def start_server(workspace: Path, devices: str = "auto") -> ServerProcess:
    pictures = workspace / "pictures"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for name in ("red", "green", "blue", "grey", "pink", "teal"):
        Image.fromarray(generator.integers(0, 255, (64, 64, 3), np.uint8)).save(pictures / f"{name}.png")
    return ServerProcess(workspace, SIMPLETUNER_TRAINER="", OMP_NUM_THREADS="1", SIMPLETUNER_DEVICES=devices)
