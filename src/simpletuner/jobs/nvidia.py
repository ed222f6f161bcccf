"""NVIDIA cards of this machine, through NVML where its package is installed, else through nvidia-smi."""

from __future__ import annotations

import importlib
import subprocess
from dataclasses import dataclass
from typing import Any

SMI = ("nvidia-smi", "--query-gpu=index,memory.total,memory.free,name", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Card:
    """`visible_id` is what CUDA_VISIBLE_DEVICES calls it. Bytes are None for a card without a memory of its own."""

    visible_id: str
    name: str
    total_bytes: int | None
    free_bytes: int | None


def read_cards() -> list[Card]:
    """As they are now; empty without either reader."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return read_smi()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        return [_read_card(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def _read_card(nvml: Any, index: int) -> Card:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Card(str(index), str(nvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free))


def read_smi() -> list[Card]:
    try:
        answer = subprocess.run(SMI, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",", 3)] for line in answer.stdout.splitlines()]
    return [Card(index, name, _mebibytes(total), _mebibytes(free)) for index, total, free, name in rows]


def _mebibytes(text: str) -> int | None:
    """`[N/A]` is none."""
    return int(text) << 20 if text.isdigit() else None
