"""The parts of one model: where their files are, and how each comes to memory. The same for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from simpletuner.config.train_config import TrainConfig
from simpletuner.families.base import DTYPES
from simpletuner.families.encoders import AutoencoderLatents, fingerprint
from simpletuner.families.repository import Repository
from simpletuner.families.spec import FamilySpec
from simpletuner.families.weights import default_dtype, empty_base_model, load_base_model, weight_dtype


class Parts:
    """`shapes_only`: modules are built from their configurations and no weight is read. Under a `FakeTensorMode` they
    take no memory, so that a run can be rehearsed: `train.rehearsal`."""

    def __init__(self, config: TrainConfig, spec: FamilySpec, *, shapes_only: bool = False) -> None:
        model = config.model
        self._config = config
        self._spec = spec
        self._shapes_only = shapes_only
        self.repository = Repository(
            model.pretrained_model_name_or_path,
            revision=model.revision,
            variant=model.variant,
            without_weights=shapes_only,
        )
        self.vae = self._other(model.pretrained_vae_model_name_or_path)
        self.transformer = self._other(model.pretrained_transformer_model_name_or_path)
        self.weight_dtype = weight_dtype(config)
        self.text_dtype = DTYPES[config.precision.base_model_default_dtype]
        self._vae_dtype = DTYPES.get(model.vae_dtype)

    def _other(self, name: str | None) -> Repository:
        if not name:
            return self.repository
        return Repository(name, variant=self.repository.variant, without_weights=self._shapes_only)

    def load_denoiser(self, kind: Any, folder: Path | None = None) -> nn.Module:
        """A diffusers model of class `kind` from `folder` (a checkpoint's, an export's), else from the repository."""
        source = folder or self.transformer.part(self._config.model.pretrained_transformer_subfolder)
        if self._shapes_only:
            return empty_base_model(kind, source, self._config, self._spec)
        variant = None if folder else self.transformer.variant
        return load_base_model(kind, source, self._config, self._spec, variant=variant)

    def load_autoencoder(self, device: torch.device) -> AutoencoderKL:
        """For inference, in `vae_dtype`; `default` is the type of its files."""
        source = self.vae.part("vae")
        if self._shapes_only:
            kind: Any = AutoencoderKL
            with default_dtype(self._vae_dtype or torch.float32):
                return kind.from_config(kind.load_config(source)).eval()
        vae: Any = AutoencoderKL.from_pretrained(source, torch_dtype=self._vae_dtype, variant=self.vae.variant)
        return vae.to(device).eval()

    def load_text_encoder(self, kind: Any, subfolder: str, device: torch.device) -> Any:
        """A transformers model of class `kind`, for inference."""
        source, variant = self.repository.part(subfolder), self.repository.variant
        if self._shapes_only:
            with default_dtype(self.text_dtype):
                return kind(kind.config_class.from_pretrained(source)).eval()
        return kind.from_pretrained(source, dtype=self.text_dtype, variant=variant).to(device).eval()

    def picture_fingerprint(self) -> str:
        """All that latents depend on; `2` is the order in which pictures are scaled (`AutoencoderLatents.encode`)."""
        files = self.vae.hash_of(["vae"])
        return fingerprint(kind="AutoencoderKL 2", files=files, dtype=self._config.model.vae_dtype)

    def load_picture_encoder(self, device: torch.device) -> AutoencoderLatents:
        return AutoencoderLatents(self.load_autoencoder(device), self.picture_fingerprint())

    def text_fingerprint(self, subfolders: tuple[str, ...], **facts: Any) -> str:
        """All that a caption's entry depends on."""
        return fingerprint(files=self.repository.hash_of(subfolders), dtype=str(self.text_dtype), **facts)
