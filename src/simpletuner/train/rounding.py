"""Stochastic rounding from fp32 to bf16 with random bits from a counter: no generator, no state, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from simpletuner.data.keys import key_seed

_FIRST, _SECOND, _THIRD = -2048144789, -1028477387, -1640531535
"""Odd multipliers: the finaliser of MurmurHash3 and the golden ratio, as signed 32-bit integers."""


def noise_bits(start: int, count: int, seed: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two int32 words per element from the counter (seed, step, element); an element is its place in the buffer."""
    word = torch.arange(start, start + count, dtype=torch.int32, device=device)
    word.add_(key_seed("rounding", seed, step) & 0x7FFFFFFF)
    _fold(word, 16).mul_(_FIRST)
    _fold(word, 15).mul_(_SECOND)
    _fold(word, 16)
    return word, _fold(word * _THIRD, 15)


def _fold(word: Tensor, shift: int) -> Tensor:
    """word ^= word >>> shift. torch shifts arithmetically: the mask takes the copies of the sign away."""
    return word.bitwise_xor_((word >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def round_stochastically(value: Tensor, bits: tuple[Tensor, Tensor], index: int) -> Tensor:
    """fp32 → bf16: 16 random bits added below the kept ones, the rest cut off. `index` 0–2 picks the 16 bits."""
    word = bits[index // 2]
    noise = (word >> 16 if index % 2 else word) & 0xFFFF
    return noise.add_(value.view(torch.int32)).bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)
