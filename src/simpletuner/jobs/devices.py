"""What jobs can be placed on: the inventory of this machine."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from simpletuner.errors import UserError

HINT = 'Use auto, cpu:2 or a JSON list such as [{"name": "A100", "memory_gb": 80, "kind": "cuda"}].'
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Device:
    """A slot that holds one job at a time. `visible_id` is what CUDA_VISIBLE_DEVICES calls it."""

    index: int
    name: str
    memory_gb: float = 0.0
    kind: str = "cpu"
    visible_id: str = ""


Probe = Callable[[], list[Device]]


def read_inventory(setting: str, environ: Mapping[str, str], *, probe: Probe | None = None) -> list[Device]:
    """`setting` is SIMPLETUNER_DEVICES. At least one device: a machine without accelerators has one `cpu` slot."""
    setting = setting.strip() or "auto"
    if setting == "auto":
        found = _within_visible((probe or probe_nvidia)(), environ.get("CUDA_VISIBLE_DEVICES"))
        return found or [Device(0, "cpu")]
    if match := re.fullmatch(r"cpu(?::(\d+))?", setting):
        count = int(match[1] or 1)
        if count:
            return [Device(index, "cpu") for index in range(count)]
    elif setting.startswith("["):
        return _from_json(setting)
    raise UserError("invalid_config", f"SIMPLETUNER_DEVICES={setting!r} is not an inventory.", hint=HINT)


def probe_nvidia() -> list[Device]:
    """Through NVML where its package is installed, else through nvidia-smi; empty without either."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return _probe_nvidia_smi()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    found: list[Device] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory_gb = round(nvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1)
        found.append(Device(index, str(nvml.nvmlDeviceGetName(handle)), memory_gb, "cuda", str(index)))
    nvml.nvmlShutdown()
    return found


def _probe_nvidia_smi() -> list[Device]:
    try:
        answer = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found: list[Device] = []
    for line in answer.stdout.splitlines():
        index, name, memory_mib = (part.strip() for part in line.split(",", 2))
        found.append(Device(int(index), name, round(float(memory_mib) / 1024, 1), "cuda", index))
    return found


def _within_visible(devices: list[Device], visible: str | None) -> list[Device]:
    """Renumbered from 0 in the order of CUDA_VISIBLE_DEVICES, as every CUDA program counts them."""
    if visible is None:
        return devices
    by_id = {device.visible_id: device for device in devices}
    named = [by_id[name] for name in (part.strip() for part in visible.split(",")) if name in by_id]
    return [
        Device(index, device.name, device.memory_gb, device.kind, device.visible_id)
        for index, device in enumerate(named)
    ]


def _from_json(setting: str) -> list[Device]:
    try:
        entries = cast(list[dict[str, Any]], json.loads(setting))
        devices = [
            Device(
                index,
                str(entry["name"]),
                float(entry.get("memory_gb", 0)),
                str(entry.get("kind", "cpu")),
                str(index) if entry.get("kind") == "cuda" else "",
            )
            for index, entry in enumerate(entries)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("invalid_config", f"SIMPLETUNER_DEVICES is not an inventory: {error}.", hint=HINT) from error
    if not devices:
        raise UserError("invalid_config", "SIMPLETUNER_DEVICES is an empty list.", hint=HINT)
    return devices
