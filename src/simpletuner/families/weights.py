"""How a base model's weights come to memory: in one type, or quantised."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.config.train_config import TrainConfig
from simpletuner.families.base import DTYPES
from simpletuner.families.precision import PRECISIONS, check_precision
from simpletuner.families.quantize import load_quantised, shape_quantised
from simpletuner.families.spec import FamilySpec


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """`base_model_precision` where it names a type, else `base_model_default_dtype`."""
    return DTYPES.get(config.precision.base_model_precision, DTYPES[config.precision.base_model_default_dtype])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Generator[None]:
    """New floating tensors are of this type inside: tensors without content cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """fp32 weights may compute in a smaller type; smaller weights compute in their own, an adapter in its base's."""
    wanted = DTYPES.get(config.precision.mixed_precision)
    weights = weight_dtype(config)
    if config.model.model_type == "lora" and weights is not torch.float32:
        return weights
    return wanted if weights is torch.float32 and wanted is not None else None


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


def empty_base_model(kind: Any, folder: Path, config: TrainConfig, spec: FamilySpec) -> nn.Module:
    """What `load_base_model` would give, from the configuration alone: modules, types and sizes, no weights."""
    with default_dtype(weight_dtype(config)):
        model = kind.from_config(kind.load_config(folder))
    if config.precision.base_model_precision not in PRECISIONS:
        return model
    shape_quantised(model, config.precision.base_model_precision, spec.unquantised)
    return model.requires_grad_(False).eval()
