"""How much memory the devices of this machine have room for. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from simpletuner.jobs.devices import Device


class DeviceRoom:
    """Room on each device: what is free where no job of ours runs, else all of it, as the job will give it back."""

    def __init__(self, devices: Sequence[Device], unleased: frozenset[int], free_bytes: Mapping[int, int]) -> None:
        self._room: dict[int, int] = {}
        for device in devices:
            if device.index in unleased and device.index in free_bytes:
                self._room[device.index] = free_bytes[device.index]
            elif device.memory_gb and device.kind != "cpu":
                self._room[device.index] = round(device.memory_gb * 2**30)
        self._num_unknown = len(devices) - len(self._room)
        self._sorted = sorted(self._room.values())

    def room(self, index: int) -> int | None:
        return self._room.get(index)

    @property
    def largest(self) -> int:
        return self._sorted[-1] if self._sorted else 0

    def num_with(self, peak_bytes: int) -> int:
        """Devices of unknown memory are taken to have it."""
        return self._num_unknown + len(self._sorted) - bisect_left(self._sorted, peak_bytes)

    def fitting(self, indices: list[int], peak_bytes: int | None) -> list[int]:
        if peak_bytes is None or not self._room or self._sorted[0] >= peak_bytes:
            return indices
        return [index for index in indices if self._room.get(index, peak_bytes) >= peak_bytes]
