"""Encoders shared by families: autoencoder latents, and T5 text through an official pipeline's own preparation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor


def fingerprint(**facts: Any) -> str:
    """A name for all that an encoder's output depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class AutoencoderLatents:
    """KL autoencoder: a posterior's sample, its noise from the entry's key, or its mode; shifted and scaled."""

    def __init__(self, vae: AutoencoderKL, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self._vae = vae
        self._scale: float = vae.config["scaling_factor"]
        self._shift: float = vae.config.get("shift_factor") or 0.0

    @torch.inference_mode()
    def encode(self, pixels_BCHW: Tensor, keys: Sequence[str], *, sample: bool) -> list[Tensor]:
        """uint8 pixels (B, 3, H, W) → latents (C, H/8, W/8) each, on the CPU, in the autoencoder's type."""
        # In the official image processor's own order of roundings, and in its memory layout, which decides kernels:
        # what training sees is, number for number, what sampling will see.
        values = pixels_BCHW.to(self._vae.device, non_blocking=True).float() / 255.0 * 2.0 - 1.0
        pixels = torch.empty_like(values, dtype=self._vae.dtype, memory_format=torch.channels_last).copy_(values)
        posterior = self._vae.encode(pixels, return_dict=False)[0]
        # The mode is scaled in the autoencoder's type, as the official pipeline scales a reference.
        unscaled = posterior.mean
        if sample:
            noise = torch.stack([_key_noise(key, posterior.mean.shape[1:]) for key in keys])
            unscaled = unscaled.float() + posterior.std.float() * noise.to(self._vae.device)
        latents = ((unscaled - self._shift) * self._scale).to(self._vae.dtype).cpu()
        return [row.clone() for row in latents]


def _key_noise(key: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(int(key[:15], 16))
    return torch.randn(shape, generator=generator)
