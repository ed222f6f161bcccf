"""The machine and the server itself: /api/system."""

from __future__ import annotations

import os
import platform
import shutil
import time
from typing import Literal

import psutil
from fastapi import APIRouter, Request
from pydantic import BaseModel

import simpletuner
from simpletuner.events import utc_now
from simpletuner.job import ACTIVE, JobStatus
from simpletuner.server.audit_trail import audits
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.identity import Identity
from simpletuner.server.rights import needs
from simpletuner.server.sight import owner_filter

router = APIRouter(prefix="/api/system", tags=["system", "training"])


class Disk(BaseModel):
    total_bytes: int
    free_bytes: int
    percent: float


class Gpu(BaseModel):
    index: int
    name: str
    memory_gb: float


class Inventory(BaseModel):
    backend: str
    count: int
    capabilities: list[str]


class DeviceUse(BaseModel):
    index: int
    name: str
    memory_gb: float
    allocated: bool
    job_id: str | None


class Allocation(BaseModel):
    allocated_gpus: list[int]
    available_gpus: list[int]
    running_local_jobs: int
    devices: list[DeviceUse]


class SystemStatus(BaseModel):
    timestamp: str
    uptime_seconds: float
    load_avg_5min: float
    memory_percent: float
    disk: Disk
    version: str
    gpus: list[Gpu]
    gpu_inventory: Inventory
    gpu_allocation: Allocation | None = None


class ShuttingDown(BaseModel):
    status: str = "shutting_down"
    message: str


@router.get(
    "/status", operation_id="system_status", dependencies=[needs("system.view")], response_model_exclude_unset=True
)
def system_status(core: CoreDep, identity: IdentityDep, include_allocation: bool = False) -> SystemStatus:
    devices = core.placement.devices
    accelerators = [device for device in devices if device.kind != "cpu"]
    disk = shutil.disk_usage(core.settings.workspace)
    status = SystemStatus(
        timestamp=utc_now(),
        uptime_seconds=round(time.monotonic() - core.started_at, 3),
        load_avg_5min=os.getloadavg()[1],
        memory_percent=psutil.virtual_memory().percent,
        disk=Disk(total_bytes=disk.total, free_bytes=disk.free, percent=round(100 * disk.used / max(1, disk.total), 1)),
        version=simpletuner.__version__,
        gpus=[Gpu(index=device.index, name=device.name, memory_gb=device.memory_gb) for device in accelerators],
        gpu_inventory=Inventory(
            backend=devices[0].kind, count=len(devices), capabilities=[platform.machine(), devices[0].kind]
        ),
    )
    if include_allocation:
        status.gpu_allocation = read_allocation(core, identity)
    return status


def read_allocation(core: Core, identity: Identity) -> Allocation:
    """Every device is either allocated or available; who may not see its job sees that it is taken."""
    leases = core.store.jobs.leases()
    shown = set(leases.values()) & core.store.jobs.ids(user_id=owner_filter(identity))
    uses = [
        DeviceUse(
            index=device.index,
            name=device.name,
            memory_gb=device.memory_gb,
            allocated=device.index in leases,
            job_id=job_id if (job_id := leases.get(device.index)) in shown else None,
        )
        for device in core.placement.devices
    ]
    return Allocation(
        allocated_gpus=[use.index for use in uses if use.allocated],
        available_gpus=[use.index for use in uses if not use.allocated],
        running_local_jobs=len(set(leases.values())),
        devices=uses,
    )


@router.post(
    "/shutdown",
    operation_id="shutdown",
    dependencies=[needs("admin.system"), audits("system.shutdown")],
    status_code=202,
)
def shutdown(core: CoreDep, request: Request, jobs: Literal["keep", "stop", "cancel"] = "keep") -> ShuttingDown:
    """Jobs go on without a server unless told otherwise; queued ones wait for the next."""
    mode = {"stop": "stop", "cancel": "cancel"}.get(jobs)
    affected = core.store.jobs.with_status(ACTIVE) if mode else []
    if mode == "cancel":
        affected += core.store.jobs.with_status([JobStatus.QUEUED, JobStatus.BLOCKED])
    for job in affected:
        core.supervisor.request_end(job.job_id, mode or "stop")
    request.app.state.request_shutdown()
    return ShuttingDown(message=f"The server ends; {len(affected)} jobs were asked to {jobs}.")
