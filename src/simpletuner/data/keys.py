"""Counter streams: every random choice is a hash of what it is for, never of when it was made."""

from __future__ import annotations

from hashlib import sha256

Part = str | int


def digest(*key: Part) -> bytes:
    """SHA-256 of the NUL-joined key, 32 bytes."""
    return sha256("\0".join(map(str, key)).encode("utf-8", "surrogateescape")).digest()


def word(*key: Part) -> int:
    """The first 64 bits of the key's digest, uniform over 0 … 2⁶⁴ − 1."""
    # As `digest`, without a call more: several are drawn for each sample of a step.
    return int.from_bytes(sha256("\0".join(map(str, key)).encode("utf-8", "surrogateescape")).digest()[:8], "big")


def u(*key: Part) -> float:
    """Uniform in [0, 1): `word` ÷ 2⁶⁴ (training.md, head). Rounded down to 53 bits, so that it never reaches 1."""
    return (word(*key) >> 11) / 2**53


def below(n: int, *key: Part) -> int:
    """⌊n·u(key)⌋ in exact arithmetic: uniform over 0 … n − 1."""
    return (n * word(*key)) >> 64


def key_seed(*key: Part) -> int:
    """A 63-bit seed for a generator (torch takes signed 64-bit seeds)."""
    return word(*key) >> 1
