"""Samplers by the names of `validation_noise_scheduler`, built from the repository's scheduler configuration."""

from __future__ import annotations

from typing import Any

import diffusers

SAMPLERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}


_CLIPPING = ("DDIMScheduler", "DDPMScheduler")
"""Made for pixels: unless told otherwise they cut their estimates to [−1, 1], which latents go beyond."""


def build_sampler(config: dict[str, Any], name: str | None, prediction_type: str | None) -> Any:
    """The repository's own class unless `name` says another; `prediction_type` as in training."""
    kind = SAMPLERS[name] if name else config.get("_class_name", "DPMSolverMultistepScheduler")
    effective = config | ({"prediction_type": prediction_type} if prediction_type else {})
    if kind in _CLIPPING:
        effective["clip_sample"] = False
    return getattr(diffusers, kind).from_config(effective)
