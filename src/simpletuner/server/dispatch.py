"""What a worker is told to do (api.md §5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpletuner.checkpoints import BEST, list_checkpoints
from simpletuner.jobs.inputs import resume_of
from simpletuner.server.core import Core
from simpletuner.server.input_shelf import told_of
from simpletuner.store.assignments import Assignment


def job_messages(core: Core, worker_id: str) -> list[dict[str, Any]]:
    """`job_submit` of each assignment whose lease nobody took yet."""
    offered = [assignment for assignment in core.store.assignments.live(worker_id) if assignment.state == "offered"]
    alive = [assignment for assignment in offered if core.leases.is_alive(assignment.job_id, assignment.epoch)]
    return [_job_submit(core, assignment) for assignment in alive]


def _job_submit(core: Core, assignment: Assignment) -> dict[str, Any]:
    job_id = assignment.job_id
    folder = core.placement.job_dir(job_id)
    spec, frozen, told = folder.read_spec(), folder.read_config(), told_of(folder)
    wanted = resume_of(frozen["config"], continues=spec.continues)
    output_dir = Path(spec.output_dir)
    best = (output_dir / BEST).resolve()
    return {
        "type": "job_submit",
        "job_id": job_id,
        "epoch": assignment.epoch,
        "attempt": spec.attempt,
        "spec": spec.model_dump(mode="json"),
        "config": told.config,
        "provenance": frozen["provenance"],
        "datasets": told.datasets,
        "places": [{"name": place.name, "kind": place.kind, "path": str(place.path)} for place in told.places],
        "resume_from": _checkpoint(output_dir, wanted),
        "best": best.name if best.is_dir() else None,
        "upload_endpoint": f"/api/cloud/storage/{job_id}",
        "upload_token": core.job_tokens.mint(job_id, assignment.epoch),
        "lease_s": core.settings.timers.lease_s,
        "heartbeat_s": core.settings.timers.heartbeat_s,
        "secrets": dict(core.settings.worker_secrets),
    }


def _checkpoint(output_dir: Path, wanted: str | None) -> str | None:
    """The one that the job begins with."""
    if wanted is None:
        return None
    complete = [folder.name for folder in list_checkpoints(output_dir) if folder.manifest is not None]
    return wanted if wanted in complete else next(iter(complete), None)
