"""The seam between the trainer and a model family: what a family must be able to do, in torch terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from simpletuner.config.train_config import TrainConfig
from simpletuner.data.loader import Batch
from simpletuner.families.spec import FamilySpec
from simpletuner.families.watching import Watch

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PictureEncoder(Protocol):
    """Autoencoder as the cache sees it. `fingerprint` names all that its output depends on."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, pixels_BCHW: Tensor, keys: Sequence[str], *, sample: bool) -> list[Tensor]:
        """A sample of each posterior, its noise from the keys, or the posterior's mode."""
        ...


class CaptionEncoder(Protocol):
    """Text encoders as the cache sees them."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]: ...

    def encode_prompt(self, prompt: str) -> dict[str, Tensor]:
        """Exactly what the official pipeline computes for one prompt, untrimmed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """One validation image: embeddings of `encode_prompt`, size in pixels, sampler settings."""

    prompt: dict[str, Tensor]
    negative: dict[str, Tensor]
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    references: tuple[Tensor, ...] = ()
    """Latents C×H×W of the pictures that an edit starts from."""
    watch: Watch | None = None
    """Who looks on while it is sampled; latents come as 1×C×H×W."""


Draw = Callable[[ImageRequest], Image.Image]


class Family(Protocol):
    """The verbs. Only `predict` is called inside the loop."""

    spec: FamilySpec

    def load_denoiser(self, folder: Path | None = None) -> nn.Module:
        """The denoiser in its weight type, from `folder` (a checkpoint) or the repository."""
        ...

    def load_autoencoder(self, device: torch.device) -> Any:
        """diffusers' own, for inference."""
        ...

    def picture_fingerprint(self) -> str: ...

    def load_picture_encoder(self, device: torch.device) -> PictureEncoder: ...

    def load_text_encoders(self, device: torch.device) -> list[nn.Module]:
        """transformers' own, for inference, in the order of the specification's `text`."""
        ...

    def caption_fingerprint(self) -> str: ...

    def load_caption_encoder(self, device: torch.device) -> CaptionEncoder: ...

    def scheduler_config(self) -> dict[str, Any]:
        """The repository's scheduler configuration: betas, prediction type, number of timesteps."""
        ...

    def collate_text(self, entries: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Cached embeddings of a batch → the tensors that `predict` takes."""
        ...

    def longest_caption(self, denoiser: nn.Module) -> dict[str, Tensor]:
        """A cached entry of as many tokens as there can be, without content."""
        ...

    def predict(self, denoiser: nn.Module, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch) -> Tensor: ...

    def validation_pipeline(self, denoiser: nn.Module, device: torch.device) -> Draw: ...

    def export_pipeline(self, folder: Path, denoiser: nn.Module) -> None:
        """Write a whole diffusers pipeline into `folder`, the denoiser being ours, the rest the repository's."""
        ...


def build_family(config: TrainConfig, spec: FamilySpec, *, shapes_only: bool = False) -> Family:
    """Import the training half that the specification names. `shapes_only`: see `families.parts.Parts`."""
    import importlib

    module, _, name = spec.implementation.partition(":")
    return vars(importlib.import_module(module))[name](config, spec, shapes_only=shapes_only)
