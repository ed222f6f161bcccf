"""How a base model's weights come to memory: in one type, or quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.config.train_config import TrainConfig
from simpletuner.families.base import DTYPES
from simpletuner.families.quantize import PRECISIONS, load_quantised
from simpletuner.families.spec import FamilySpec


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """`base_model_precision` where it names a type, else `base_model_default_dtype`."""
    return DTYPES.get(config.precision.base_model_precision, DTYPES[config.precision.base_model_default_dtype])


def load_base_model(
    kind: Any, folder: Path, config: TrainConfig, spec: FamilySpec, *, variant: str | None = None
) -> nn.Module:
    """A diffusers model of class `kind` from `folder`, on the CPU; frozen where it is quantised."""
    precision = config.precision.base_model_precision
    if precision in PRECISIONS:
        return load_quantised(
            kind, folder, precision, dtype=weight_dtype(config), unquantised=spec.unquantised, variant=variant
        )
    return kind.from_pretrained(folder, torch_dtype=weight_dtype(config), variant=variant)
