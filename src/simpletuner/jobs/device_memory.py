"""How much memory is free on each device now: what other programs hold is seen, not assumed."""

from __future__ import annotations

import importlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simpletuner.jobs.devices import Device

NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits")
FRESH_S = 1.0
"""So long an answer counts: the queue is planned at every request and each second."""

Read = Callable[[], Mapping[str, int]]


class MemoryGauge:
    """Of devices that were found, not declared: nobody else is on a declared slot."""

    def __init__(
        self, devices: Sequence[Device], *, read: Read | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._index_of = {device.visible_id: device.index for device in devices if device.kind == "cuda"}
        self._read = read or read_nvidia
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


def read_nvidia() -> dict[str, int]:
    """Free bytes by what CUDA_VISIBLE_DEVICES calls a device; through NVML, else nvidia-smi. Empty without either."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return read_nvidia_smi()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return {}
    try:
        handles = [(index, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]
        return {str(index): int(nvml.nvmlDeviceGetMemoryInfo(handle).free) for index, handle in handles}
    except nvml.NVMLError:
        return {}
    finally:
        nvml.nvmlShutdown()


def read_nvidia_smi() -> dict[str, int]:
    try:
        answer = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [line.split(",") for line in answer.stdout.splitlines()]
    return {index.strip(): int(free_mib) << 20 for index, free_mib in rows if free_mib.strip().isdigit()}
