"""Images while they are sampled: small, quick decoders on a thread of their own. training.md §7.1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from simpletuner.config.train_config import TrainConfig
from simpletuner.events import ValidationImageData
from simpletuner.families.base import Family
from simpletuner.families.watching import Watch
from simpletuner.train.inputs import Inputs
from simpletuner.train.report import Reporter

_MOST_WAITING = 4
_FITTED_ON = 4
"""Pictures."""

Decode = Callable[[Tensor], Tensor]
"""Latents (C, H, W) → RGB (3, h, w) in [−1, 1]."""


def shown_steps(total: int, interval: int) -> frozenset[int]:
    """Of sampler steps 1 … `total`: the first, then every `interval`-th, and always the last."""
    return frozenset({*range(1, total + 1, interval), total})


@dataclass(frozen=True, slots=True)
class LinearMap:
    """An affine map of each latent to one pixel: colours and layout without detail, where there is no decoder."""

    weight: Tensor
    """(C + 1, 3); the last row is the constant."""

    @classmethod
    def fit(cls, latents: Sequence[Tensor], pictures: Sequence[Tensor]) -> LinearMap:
        """Least squares; `pictures` (3, H·s, W·s) are what the autoencoder makes of the `latents` (C, H, W)."""
        sides = [(z.shape[-2], z.shape[-1]) for z in latents]
        small = [adaptive_avg_pool2d(p.float().cpu(), side) for p, side in zip(pictures, sides, strict=True)]
        rows = torch.cat([_with_one(z) for z in latents])
        targets = torch.cat([p.flatten(1).T for p in small])
        return cls(torch.linalg.lstsq(rows, targets).solution)

    def __call__(self, latents: Tensor) -> Tensor:
        return (_with_one(latents) @ self.weight).T.unflatten(1, latents.shape[-2:])


def _with_one(latents: Tensor) -> Tensor:
    flat = latents.float().cpu().flatten(1).T
    return torch.cat([flat, torch.ones(len(flat), 1)], 1)


def load_decoder(repository: str, device: torch.device, fit: Callable[[], LinearMap], reporter: Reporter) -> Decode:
    """The tiny autoencoder, or the linear map that `fit` gives, which is said once."""
    try:
        tiny: Any = AutoencoderTiny.from_pretrained(repository)
    except (OSError, ValueError) as error:
        message = f"Previews are coarse: the tiny autoencoder {repository} cannot be had: {error}"
        reporter.notify("preview_fallback", message)
        return fit()
    tiny = tiny.to(device, torch.float32 if device.type == "cpu" else torch.float16).eval()
    return lambda latents: tiny.decode(latents[None].to(device, tiny.dtype), return_dict=False)[0][0]


class Previews:
    """`watch` gives what a sampler is watched with while one image is drawn; `finish` waits for the last of them."""

    def __init__(self, load: Callable[[], Decode], interval: int, reporter: Reporter) -> None:
        self._load = load
        self._interval = interval
        self._reporter = reporter
        self._pool = ThreadPoolExecutor(1, "previews")
        self._decode: Decode | None = None
        self._waiting: list[Future[None]] = []
        self._has_failed = False

    def watch(self, image: ValidationImageData) -> Watch:
        """`image` describes the finished one: its `step` is the number of sampler steps."""

        def show(step: int, timestep: float, latents: Tensor) -> None:
            self._waiting = [future for future in self._waiting if not future.done()]
            if len(self._waiting) >= _MOST_WAITING and step < image.step:
                return
            changes = {
                "step": step,
                "timestep": timestep,
                "validation_type": "intermediary",
                "step_label": f"{step}/{image.step}",
            }
            # The sampler goes on writing into its own tensors.
            kept = latents[0].detach().clone()
            self._waiting.append(self._pool.submit(self._emit, image.model_copy(update=changes), kept))

        return Watch(shown_steps(image.step, self._interval), show)

    def finish(self) -> None:
        for future in self._waiting:
            future.result()
        self._waiting.clear()

    def _emit(self, data: ValidationImageData, latents: Tensor) -> None:
        """A preview that fails is said once; the image itself is not concerned."""
        try:
            with torch.inference_mode():
                self._decode = self._decode or self._load()
                pixels = self._decode(latents).float().clamp(-1, 1).add(1).mul(127.5).round().byte()
            content = BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(content, "png", compress_level=1)
            width, height = data.resolution
            name = f"{data.shortname}_{data.index}_{width}x{height}_{data.step}.png"
            self._reporter.image(data, name, content.getvalue(), "image/png")
        except (RuntimeError, ValueError, OSError) as error:
            if not self._has_failed:
                self._has_failed = True
                self._reporter.warn("preview_failed", f"Previews cannot be shown: {error}")

    def close(self) -> None:
        self._pool.shutdown()


def build_previews(
    config: TrainConfig, family: Family, inputs: Inputs, device: torch.device, reporter: Reporter
) -> Previews | None:
    """None unless they are asked for. Nothing is loaded before the first of them."""
    if not config.validation.validation_preview:
        return None
    spec = family.spec
    repository = spec.flavours[config.model.model_flavour].preview_decoder or spec.preview_decoder

    def fit() -> LinearMap:
        vae, latents = family.load_autoencoder(device), inputs.some_latents(_FITTED_ON)
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
        unscaled = [(z[None].to(device) / scale + shift).to(vae.dtype) for z in latents]
        return LinearMap.fit(latents, [vae.decode(z, return_dict=False)[0][0] for z in unscaled])

    interval = config.validation.validation_preview_steps
    return Previews(lambda: load_decoder(repository, device, fit, reporter), interval, reporter)
