"""`python -m simpletuner.train.preflight`: what a start would find out, without starting: data, model, memory.

Reads `{"config": {…}, "datasets": […]}`, as they are frozen for a job, from standard input; writes
`{"problems": […], "memory_plan": {…} | null}`. Of a model on the hub only configuration files are fetched.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from simpletuner.config.train_config import TrainConfig
from simpletuner.data.ledger import check_defects
from simpletuner.data.manifest import Manifest
from simpletuner.data.pairs import targets_of
from simpletuner.data.preflight import discover_all
from simpletuner.errors import Problem, UserError
from simpletuner.families.registry import load_spec
from simpletuner.families.weights import check_base
from simpletuner.train.memory import MemoryPlan, Phase
from simpletuner.train.rehearsal import Shapes, rehearse


def main() -> None:
    request = json.load(sys.stdin)
    spec = load_spec(request["config"]["model_family"])
    config = TrainConfig.from_flat(request["config"], request["datasets"], spec)
    problems: list[Problem] = []
    plan: MemoryPlan | None = None
    try:
        manifests = _discover(config, problems)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_base(config, device)
        shapes = Shapes.of([manifests[entry.id] for entry in config.image_datasets], config)
        plan = rehearse(config, spec, shapes, device)
        plan.enter(*_phases(config))
    except UserError as error:
        problems += error.problems or [
            Problem(code=error.code, message=error.message, hint=error.hint, pointer=error.pointer)
        ]
    facts = None if plan is None else plan.as_facts() | {"message": str(plan)}
    json.dump({"problems": [_row(problem) for problem in problems], "memory_plan": facts}, sys.stdout)


def _discover(config: TrainConfig, problems: list[Problem]) -> dict[str, Manifest]:
    entries = config.picture_datasets
    pointers = [config.pointer_of(entry) for entry in entries]
    targets = targets_of(discover_all(entries, config.data.aspect_bucket_alignment, pointers))
    problems += check_defects(targets, ignore_missing_files=config.data.ignore_missing_files)
    return {manifest.dataset.id: manifest for manifest in targets}


def _phases(config: TrainConfig) -> list[Phase]:
    """Those of a first run, whose caches are empty."""
    phases: list[Phase] = ["text", "latents", "step", "save"]
    return phases if config.validation.validation_disable else [*phases, "validation"]


def _row(problem: Problem) -> dict[str, Any]:
    return {"level": problem.level.value, **problem.as_dict()}


if __name__ == "__main__":
    main()
