"""What jobs can be placed on: the inventory of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from simpletuner.errors import UserError
from simpletuner.jobs.nvidia import read_cards

HINT = 'Use auto, cpu:2 or a JSON list such as [{"name": "A100", "memory_gb": 80, "kind": "cuda"}].'


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
    return [
        Device(index, card.name, round((card.total_bytes or 0) / 2**30, 1), "cuda", card.visible_id)
        for index, card in enumerate(read_cards())
    ]


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
