"""Small true encoders: what they make depends on the pixels, the text and the key, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simpletuner.data.keys import key_seed


class PoolEncoder:
    """8× mean pool and a fixed mix of channels, plus noise from the key. Latents: 4, H/8, W/8."""

    def __init__(self, fingerprint: str = "pool", dtype: torch.dtype = torch.float32) -> None:
        self.fingerprint = f"{fingerprint} {dtype}"
        self.dtype = dtype
        self.seen: list[str] = []
        self.batches: list[tuple[int, ...]] = []
        self.mix = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.3, 0.3, 0.3]])

    def encode(self, pixels_BCHW: Tensor, keys: Sequence[str], *, sample: bool) -> list[Tensor]:
        assert pixels_BCHW.dtype is torch.uint8 and len(pixels_BCHW) == len(keys)
        self.seen += keys
        self.batches.append(tuple(pixels_BCHW.shape))
        pooled = nn.functional.avg_pool2d(pixels_BCHW.float() / 127.5 - 1, 8)
        mean = torch.einsum("oc,bchw->bohw", self.mix, pooled)
        noise = torch.stack(
            [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(key_seed(key))) for key in keys]
        )
        return list((mean + 0.01 * noise * sample).to(self.dtype))


class LetterEncoder:
    """One token a character, 8 wide."""

    def __init__(self, fingerprint: str = "letters") -> None:
        self.fingerprint = fingerprint
        self.seen: list[str] = []

    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        self.seen += captions
        codes = [torch.tensor([*caption.encode(), 0], dtype=torch.bfloat16) for caption in captions]
        return [{"prompt_embeds": code[:, None] * torch.arange(1, 9, dtype=torch.bfloat16)} for code in codes]
