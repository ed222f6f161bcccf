"""How much memory a job will need of each device, where that is known before it runs (ADR 0026)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.config.budget import AUTO, parse_budget
from simpletuner.events import EventType
from simpletuner.job import JobStatus
from simpletuner.server.core import Core
from simpletuner.store.job_row import JobQuery

NUM_EARLIER = 3
_OF_NO_MEMORY = frozenset(
    {
        "accelerate_visible_devices",
        "checkpoints_total_limit",
        "learning_rate",
        "max_train_steps",
        "num_train_epochs",
        "output_dir",
        "resume_from_checkpoint",
        "seed",
        "webhook_config",
    }
)


def foresee_peak(core: Core, config: Mapping[str, Any], datasets: Sequence[Any], config_name: str | None) -> int | None:
    """The budget that it will stay inside, else the measured peak of an equal run of the same environment."""
    if all(device.kind == "cpu" for device in core.placement.devices):
        return None
    budget = config.get("memory_budget")
    if budget is not None and budget != AUTO:
        return parse_budget(budget)
    if config_name is None:
        return None
    earlier = JobQuery(statuses=(JobStatus.COMPLETED,), config_name=config_name, limit=NUM_EARLIER)
    for job in core.store.jobs.find(earlier).jobs:
        folder = core.placement.job_dir(job.job_id)
        said = core.store.events.of_type(job.job_id, EventType.TRAINING_SUMMARY)
        if said and _needs_as_much(folder.read_config()["config"], config) and folder.read_datasets() == datasets:
            return int(said[-1].as_dict()["data"]["memory_peak_bytes"]) or None
    return None


def _needs_as_much(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    names = (earlier.keys() | now.keys()) - _OF_NO_MEMORY
    return all(earlier.get(name) == now.get(name) for name in names)
