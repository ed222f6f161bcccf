"""Stochastic rounding from fp32 to bf16 with random bits from a counter: no generator, no state, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from simpletuner.data.keys import key_seed

COUNTERS = 2**32
"""So many elements have counters of their own under one key; those of a larger buffer go on under another."""

_FIRST, _SECOND, _THIRD = -2048144789, -1028477387, -1640531535
"""Odd multipliers: the finaliser of MurmurHash3 and the golden ratio, as signed 32-bit integers."""


def first_counters(seed: int, step: int, chunk: int, count: int) -> list[int]:
    """Of the first element of each of `count` chunks of a buffer, as signed 32-bit integers; in a chunk they count on.

    `chunk`: elements of each, a divisor of `COUNTERS`.
    """
    starts = range(0, chunk * count, COUNTERS)
    # The first key is that of checkpoints from before buffers could be so long.
    keys = [key_seed("rounding", seed, step, *([start // COUNTERS] if start else [])) & 0x7FFFFFFF for start in starts]
    half = COUNTERS // 2
    return [(keys[at // COUNTERS] + at + half) % COUNTERS - half for at in range(0, chunk * count, chunk)]


def store_rounded(
    values: tuple[Tensor, Tensor, Tensor], targets: tuple[Tensor, Tensor, Tensor], first: int | Tensor, keep: Tensor
) -> None:
    """Round fp32 `values` into bf16 `targets`, all (N,) with N < 2³¹, with random bits from the counter `first` on.

    16 random bits are added below the bits that are kept, then the rest is cut off. Only where `keep`, a scalar on the
    device, is true: to look at it here would mean to wait for it. `first`: of `first_counters`, or an int32 tensor.
    """
    # One function, as it is the core of a step. `>>` copies the sign of an int32: the masks take the copies away.
    word = torch.arange(len(values[0]), dtype=torch.int32, device=values[0].device).add_(first)
    word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)
    word.bitwise_xor_((word >> 15).bitwise_and_(0x1FFFF)).mul_(_SECOND)
    word.bitwise_xor_((word >> 16).bitwise_and_(0xFFFF))
    other = word * _THIRD
    other.bitwise_xor_((other >> 15).bitwise_and_(0x1FFFF))
    for value, target, noise in zip(values, targets, (word, word >> 16, other), strict=True):
        bits = (noise & 0xFFFF).add_(value.view(torch.int32)).bitwise_and_(-65536)
        torch.where(keep, bits.view(torch.float32).to(torch.bfloat16), target, out=target)
