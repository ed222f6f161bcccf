"""How a base model's weights come to memory: in one type, or quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.config.train_config import TrainConfig
from simpletuner.families.base import DTYPES
from simpletuner.families.precision import PRECISIONS, check_precision
from simpletuner.families.quantize import load_quantised
from simpletuner.families.spec import FamilySpec


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """`base_model_precision` where it names a type, else `base_model_default_dtype`."""
    return DTYPES.get(config.precision.base_model_precision, DTYPES[config.precision.base_model_default_dtype])


def check_base(config: TrainConfig, device: torch.device) -> None:
    """Whether the base's precision can be had on this device: asked before anything is read. Raises UserError."""
    options = config.precision
    if options.base_model_precision in PRECISIONS:
        check_precision(options.base_model_precision, device, weight_dtype(config), options.quantize_via)


def load_base_model(
    kind: Any, folder: Path, config: TrainConfig, spec: FamilySpec, *, variant: str | None = None
) -> nn.Module:
    """A diffusers model of class `kind` from `folder`, on the CPU; a quantised one frozen, where training will be."""
    options = config.precision
    if options.base_model_precision not in PRECISIONS:
        return kind.from_pretrained(folder, torch_dtype=weight_dtype(config), variant=variant)
    return load_quantised(
        kind,
        folder,
        options.base_model_precision,
        default_dtype=weight_dtype(config),
        exclude=spec.unquantised,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        variant=variant,
        via=options.quantize_via,
    )
