"""What the scan of an environment's datasets is asked: it belongs to the training world, and runs as its process."""

from __future__ import annotations

from typing import Any

from simpletuner.config.train_config import TrainConfig

PREFLIGHT = "simpletuner.data.preflight"
"""Module to run; it reads the request as JSON and writes a JSON line per file, then per dataset, then per problem."""


def preflight_request(config: TrainConfig) -> dict[str, Any]:
    return {
        "alignment": config.data.aspect_bucket_alignment,
        "ignore_missing_files": config.data.ignore_missing_files,
        "datasets": [entry.model_dump(mode="json") for entry in config.picture_datasets],
        "pointers": [config.pointer_of(entry) for entry in config.picture_datasets],
    }
