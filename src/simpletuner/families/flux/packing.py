"""Flux's tokens: 2×2 latents packed into one, and their places. training.md §4.4.

Legend: B samples, C H W latent, N tokens (H/2 · W/2), references likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(latents_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) → (B, N, 4C); feature 4c + 2·dy + dx."""
    batch, channels, height, width = latents_BCHW.shape
    split = latents_BCHW.view(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens_BNF: Tensor, height: int, width: int) -> Tensor:
    """The reverse; `height` and `width` of the latents."""
    batch, _, features = tokens_BNF.shape
    split = tokens_BNF.view(batch, height // 2, width // 2, features // 4, 2, 2)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


def position_ids(height: int, width: int, *, image: int = 0, y: int = 0, x: int = 0) -> Tensor:
    """(N, 3): image number, row, column of each token of latents H×W that lie at (y, x), in latents."""
    ids = torch.zeros(height // 2, width // 2, 3)
    ids[..., 0] = image
    ids[..., 1] += torch.arange(height // 2)[:, None] + y // 2
    ids[..., 2] += torch.arange(width // 2)[None, :] + x // 2
    return ids.flatten(0, 1)


def reference_offsets(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(y, x) of each reference of latent size (height, width): beside or below those before, whichever grows less."""
    right = below = 0
    offsets: list[tuple[int, int]] = []
    for height, width in sizes:
        y, x = (0, right) if height + below > width + right else (below, 0)
        offsets.append((y, x))
        right, below = max(right, width + x), max(below, height + y)
    return offsets


def pack_references(references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Latents B×C×H×W of each reference → their tokens (B, ΣN, 4C), one picture after the other, and ids (ΣN, 3)."""
    sizes = [(latents.shape[-2], latents.shape[-1]) for latents in references]
    places = zip(sizes, reference_offsets(sizes), strict=True)
    ids = [position_ids(*size, image=1, y=y, x=x) for size, (y, x) in places]
    return torch.cat([pack(latents) for latents in references], 1), torch.cat(ids)
