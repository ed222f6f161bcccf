"""`python -m simpletuner.train.preflight`: what a start would find out, without starting: data, model, memory.

Reads `{"config": {…}, "provenance": {…}, "datasets": […], "fit_budget_bytes": n | null}`, as they are frozen for a job,
from standard input; writes `{"problems": […], "memory_plan": {…} | null, "disk_plan": …, "fit": …}`, `fit` where there
is a budget. Of a model on the hub only configuration files are fetched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Container
from typing import Any

import torch

from simpletuner.config.sources import written_options
from simpletuner.config.train_config import TrainConfig
from simpletuner.data.ledger import check_defects
from simpletuner.data.manifest import Manifest
from simpletuner.data.pairs import targets_of
from simpletuner.data.preflight import discover_all
from simpletuner.errors import Problem, UserError
from simpletuner.families.registry import load_spec
from simpletuner.families.spec import FamilySpec
from simpletuner.families.weights import check_base
from simpletuner.train.budget import budget_of, choose, fitting
from simpletuner.train.disk_plan import DiskPlan
from simpletuner.train.memory import MemoryPlan, Phase
from simpletuner.train.rehearsal import Rehearsal, Shapes, plan_phases, state_ratio


def main() -> None:
    request = json.load(sys.stdin)
    spec = load_spec(request["config"]["model_family"])
    config = TrainConfig.from_flat(request["config"], request["datasets"], spec)
    found = Preflight(config, spec, written_options(request["provenance"]))
    try:
        found.look(request.get("fit_budget_bytes"))
    except UserError as error:
        found.problems += error.problems or [
            Problem(code=error.code, message=error.message, hint=error.hint, pointer=error.pointer)
        ]
    json.dump({"problems": [_row(problem) for problem in found.problems], **found.facts}, sys.stdout)


class Preflight:
    """What is found is kept as it is found: an error ends the looking."""

    def __init__(self, config: TrainConfig, spec: FamilySpec, written: Container[str]) -> None:
        """`written`: options that somebody set."""
        self._written = written
        self.problems: list[Problem] = []
        self.facts: dict[str, Any] = {"memory_plan": None, "disk_plan": None, "fit": None}
        self._config = config
        self._spec = spec
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def look(self, budget_bytes: int | None) -> None:
        """Raises UserError for what a start would be refused for."""
        config = self._config
        manifests = _discover(config, self.problems)
        trained = [manifests[entry.id] for entry in config.image_datasets]
        check_base(config, self._device)
        rehearsal = Rehearsal(config, self._spec, Shapes.of(trained, config))
        training = rehearsal.training(state_ratio(config, self._device))
        disk = DiskPlan.of(config, list(manifests.values()), rehearsal, training)
        self.facts["disk_plan"] = disk.as_facts()
        self.problems += disk.check()
        plan = plan_phases(config, self._device, rehearsal.encoding() | training.phases)
        self.facts["memory_plan"] = plan.as_facts() | {"message": str(plan)}
        if budget_bytes is not None:
            fit = fitting(config, self._spec, trained, plan, budget_bytes, written=self._written).find()
            self.facts["fit"] = fit.as_facts()
        if config.run.memory_budget is None:
            plan.enter(*_phases(config))
        else:
            self._choose(plan, manifests, told=budget_bytes is not None)

    def _choose(self, plan: MemoryPlan, manifests: dict[str, Manifest], *, told: bool) -> None:
        """What `memory_budget` would choose, were the run started here and now; `told`: `fit` is of another budget."""
        config = self._config
        budget = budget_of(config, self._device)
        fit = choose(config, self._spec, manifests, plan, budget, config.run.num_processes, self._written)
        if not told:
            facts = fit.as_facts()
            facts["message"] += " A start chooses for --memory_budget anew."
            self.facts["fit"] = facts
        plan.phases, plan.held_bytes, plan.budget_bytes = {**fit.phases}, 0, budget
        plan.enter(*_phases(config))


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
