"""Masks as the loss needs them: one channel at the size of the latents. training.md §3.6."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class MaskEncoder:
    """Channel 0 in [0, 1], averaged over each latent's square of pixels; of a segmentation whatever is above 0."""

    def __init__(self, stride: int, *, is_segmentation: bool) -> None:
        """`stride`: pixels per latent."""
        self.fingerprint = f"area {stride} {'segmentation' if is_segmentation else 'mask'}"
        self._stride = stride
        self._is_segmentation = is_segmentation

    def encode(self, pixels_BCHW: Tensor, keys: Sequence[str], *, sample: bool) -> list[Tensor]:
        """uint8 pixels (B, 3, H, W) → fp32 (1, H/stride, W/stride) each. Nothing is drawn: `keys` and `sample` are
        those of the protocol."""
        values = pixels_BCHW[:, :1].float()
        weights = (values > 0).float() if self._is_segmentation else values / 255
        return [row.clone() for row in nn.functional.avg_pool2d(weights, self._stride)]
