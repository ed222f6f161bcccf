"""Stochastic rounding from fp32 to bf16 with random bits from a counter: no generator, no state, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simpletuner.data.keys import key_seed

COUNTERS = 2**32
"""So many elements have counters of their own under one key; those of a larger buffer go on under another."""

_FIRST, _SECOND, _THIRD = -2048144789, -1028477387, -1640531535
"""Odd multipliers: the finaliser of MurmurHash3 and the golden ratio, as signed 32-bit integers."""


def first_counters(seed: int, step: int, starts: Sequence[int]) -> list[int]:
    """Of the elements with these places in a buffer, as signed 32-bit integers; from there they count on.

    Up to the next multiple of `COUNTERS`, so that what is rounded at once must not go beyond it.
    """
    half = COUNTERS // 2
    keys: dict[int, int] = {}
    counters: list[int] = []
    for start in starts:
        word = start // COUNTERS
        if word not in keys:
            # The first key is that of checkpoints from before buffers could be so long.
            keys[word] = key_seed("rounding", seed, step, *([word] if word else [])) & 0x7FFFFFFF
        counters.append((keys[word] + start + half) % COUNTERS - half)
    return counters


def nearest(value: Tensor) -> Tensor:
    """Of fp32 values the nearest that bf16 can hold, in fp32; halves to even.

    By its bits: a compiler may leave out the way to bf16 and back as if it changed nothing.
    """
    bits = value.view(torch.int32)
    return (((bits >> 16) & 1).add_(0x7FFF).add_(bits).bitwise_and_(-65536)).view(torch.float32)


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
