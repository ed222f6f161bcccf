"""How much memory is free on each device now: what other programs hold is seen, not assumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from simpletuner.jobs.devices import Device
from simpletuner.jobs.nvidia import read_cards

FRESH_S = 1.0
"""So long an answer counts: the queue is planned at every request and each second."""

Read = Callable[[], Mapping[str, int]]


class MemoryGauge:
    """Of devices that were found, not declared: nobody else is on a declared slot."""

    def __init__(
        self, devices: Sequence[Device], *, read: Read | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._index_of = {device.visible_id: device.index for device in devices if device.kind == "cuda"}
        self._read = read or free_of_cards
        self._clock = clock
        self._read_at = float("-inf")
        self._free_bytes: dict[int, int] = {}

    def free_bytes(self) -> Mapping[int, int]:
        """By index; a device that does not answer is left out."""
        if self._index_of and self._clock() - self._read_at >= FRESH_S:
            found = self._read()
            self._free_bytes = {index: found[name] for name, index in self._index_of.items() if name in found}
            self._read_at = self._clock()
        return self._free_bytes


def free_of_cards() -> dict[str, int]:
    """Free bytes by what CUDA_VISIBLE_DEVICES calls a card."""
    return {card.visible_id: card.free_bytes for card in read_cards() if card.free_bytes is not None}
