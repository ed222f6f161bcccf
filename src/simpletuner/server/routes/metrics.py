"""`GET /metrics`: the server in numbers, for Prometheus (api.md §2.8)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import PlatformCollector, ProcessCollector
from prometheus_client.core import CollectorRegistry, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

import simpletuner
from simpletuner.job import JobStatus
from simpletuner.server.core import Core, CoreDep
from simpletuner.server.rights import needs

router = APIRouter(tags=["system"])


class _ServerCollector(Collector):
    """Read when asked: nothing is counted in between."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def collect(self) -> Iterator[Metric]:
        core = self._core
        yield InfoMetricFamily("simpletuner", "This server", {"version": simpletuner.__version__})
        yield _gauge("simpletuner_uptime_seconds", "Since the start", time.monotonic() - core.started_at)
        counts = core.store.jobs.count_by_status()
        jobs = GaugeMetricFamily("simpletuner_jobs", "Jobs by status", labels=["status"])
        for status in JobStatus:
            jobs.add_metric([status.value], counts.get(status, 0))
        yield jobs
        yield _gauge("simpletuner_devices", "Devices of this machine", len(core.placement.devices))
        yield _gauge("simpletuner_devices_allocated", "Devices that jobs hold", len(core.store.jobs.leases()))
        disk = shutil.disk_usage(core.settings.workspace)
        yield _gauge("simpletuner_workspace_free_bytes", "Free on the workspace's disk", disk.free)
        yield _gauge("simpletuner_open_streams", "Event streams that are open", len(core.accounts.streams))


def _gauge(name: str, help_: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_, value=value)


@router.get(
    "/metrics",
    operation_id="prometheus_metrics",
    dependencies=[needs("metrics.read")],
    response_class=PlainTextResponse,
)
def prometheus_metrics(core: CoreDep) -> Response:
    """Text format 0.0.4."""
    registry = CollectorRegistry()
    registry.register(_ServerCollector(core))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)
