"""`simpletuner devices`."""

from __future__ import annotations

from simpletuner.cli.flags import NO_FLAGS, ServerFlags, columns


def devices(*, flags: ServerFlags = NO_FLAGS) -> int:
    """List a server's devices and the jobs that hold them."""
    with flags.client() as client:
        status = client.ask("GET", "/api/system/status", params={"include_allocation": True})
    found = status["gpu_allocation"]["devices"]
    rows = ((each["index"], each["name"], _memory(each["memory_gb"]), _use(each)) for each in found)
    return flags.show(status, *columns([("DEVICE", "NAME", "MEMORY", "JOB"), *rows]))


def _memory(gigabytes: float) -> str | None:
    return f"{gigabytes:g} GB" if gigabytes else None


def _use(device: dict[str, object]) -> object:
    """A job of somebody else's is not named."""
    return "free" if not device["allocated"] else device["job_id"] or "in use"
