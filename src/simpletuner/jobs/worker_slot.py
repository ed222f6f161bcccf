"""A worker as the planner sees it, and what all of them are held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

WorkerStatus = Literal["connecting", "idle", "busy", "draining", "quarantined", "offline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSlot:
    """It runs one job at a time. `idle_since`: seconds of any clock; the smallest has been idle longest.

    `memory_bytes` is that of each of its devices, None where it is not known.
    """

    worker_id: str
    name: str
    num_devices: int
    status: WorkerStatus
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    memory_bytes: int | None = None
    idle_since: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerTimers:
    """A renewal each `heartbeat_s`; without one the lease is over after `lease_s` (api.md §5)."""

    heartbeat_s: float = 30.0
    lease_s: float = 120.0
