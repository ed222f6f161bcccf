"""Settings that a start chooses so that the run stays inside `memory_budget`. training.md §10.4 *fit*, ADR 0024."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from itertools import islice
from typing import Any

import psutil
import torch

from simpletuner.config.budget import AUTO, parse_budget
from simpletuner.config.train_config import TrainConfig
from simpletuner.data.manifest import Manifest
from simpletuner.data.plan import EpochPlan
from simpletuner.errors import ExitCode, UserError
from simpletuner.families.spec import FamilySpec
from simpletuner.families.weights import check_base
from simpletuner.train.checkpoint import ResumePoint
from simpletuner.train.fit import RECOMPUTING, Fit, Fitting
from simpletuner.train.memory import MemoryPlan, gigabytes
from simpletuner.train.ranks import Ranks
from simpletuner.train.rehearsal import Shapes, held_bytes, plan_memory, rehearse
from simpletuner.train.report import Reporter

CHOICE = "memory_choice"
"""Key of the chosen settings in a checkpoint's record."""
_RESERVE = 1_000_000_000
"""Bytes of a machine's memory that `auto` leaves to others."""
_EPOCHS = 2
"""A split of the batch must keep every step of so many epochs."""
_PER_ENTRY = ("vae_batch_size", "text_encoder_batch_size")
"""Options that each dataset has its own value of, frozen from the common one."""


class BudgetPlanner:
    """Chooses for one start. Rank 0 chooses for all."""

    def __init__(
        self,
        config: TrainConfig,
        spec: FamilySpec,
        manifests: dict[str, Manifest],
        device: torch.device,
        ranks: Ranks,
        reporter: Reporter,
        written: Container[str] = (),
    ) -> None:
        """`written`: options that somebody set."""
        self._written = written
        self._config = config
        self._spec = spec
        self._manifests = manifests
        self._device = device
        self._ranks = ranks
        self._reporter = reporter

    def plan(self, point: ResumePoint | None) -> tuple[TrainConfig, dict[str, Manifest], MemoryPlan]:
        """The configuration to run with, and the manifests under its entries.

        Raises UserError `budget_too_small` or `will_not_fit` (71), and for a base that this device cannot have.
        """
        config = self._config
        if config.run.memory_budget is None:
            return config, self._manifests, self._without_budget(point)
        budget, choice = self._ranks.share(self._choose(point) if self._ranks.is_main else (0, {}))
        changed = apply_choice(config, choice, self._spec)
        check_base(changed, self._device)
        entries = {entry.id: entry for entry in changed.picture_datasets}
        manifests = {name: manifest.with_entries(entries) for name, manifest in self._manifests.items()}
        memory = plan_memory(changed, self._spec, manifests, self._device, budget)
        memory.choice = choice
        return changed, manifests, memory

    def _without_budget(self, point: ResumePoint | None) -> MemoryPlan:
        if point is not None and (chosen := point.record.get(CHOICE)):
            message = f"{point.folder.name} was made with settings chosen for a budget: {_written(chosen)}."
            hint = "Without --memory_budget the settings are as written. Give it again to keep that choice."
            self._reporter.warn("memory_choice_dropped", message, hint=hint, choice=chosen)
        memory = plan_memory(self._config, self._spec, self._manifests, self._device)
        free, needed = free_bytes(self._device), memory.predicted_bytes()
        if needed > free:
            message = f"The run is predicted to need {gigabytes(needed)}; {gigabytes(free)} are free now."
            hint = "--memory_budget auto chooses settings that fit into what is free."
            self._reporter.warn("memory_short", message, hint=hint, predicted_bytes=needed, free_bytes=free)
        return memory

    def _choose(self, point: ResumePoint | None) -> tuple[int, dict[str, Any]]:
        budget = budget_of(self._config, self._device)
        if point is not None and CHOICE in point.record:
            # Another choice would be another run: it is kept, and where it no longer fits the plan refuses.
            chosen: dict[str, Any] = point.record[CHOICE]
            self._say(f"As chosen when the run began: {_written(chosen)}.", "", chosen, budget)
            return budget, chosen
        trained = [self._manifests[entry.id] for entry in self._config.image_datasets]
        memory = rehearse(self._config, self._spec, Shapes.of(trained, self._config), self._device)
        fit = choose(self._config, self._spec, self._manifests, memory, budget, self._ranks.count, self._written)
        if _training_fits(fit) or self._config.model.i_know_what_i_am_doing:
            chosen = dict(fit.settings)
            self._say(str(fit), " ".join(fit.costs), chosen, budget)
            return budget, chosen
        wider = fitting(self._config, self._spec, trained, memory, budget).find()
        hint = f"What a start does not choose by itself: {wider}" if wider.fits else _NO_WAY
        raise UserError(
            "budget_too_small", str(fit), hint=hint, pointer="/--memory_budget", exit_code=ExitCode.OUT_OF_MEMORY
        )

    def _say(self, message: str, cost: str, chosen: Mapping[str, Any], budget: int) -> None:
        """A warning where something was changed at a cost, so that it is seen."""
        costs = chosen.keys() - RECOMPUTING or chosen.get("gradient_checkpointing")
        say = self._reporter.warn if costs else self._reporter.notify
        say("memory_choice", message, hint=cost, choice=dict(chosen), budget_bytes=budget)


_NO_WAY = "Raise --memory_budget, lower --resolution, or train an adapter."


def budget_of(config: TrainConfig, device: torch.device) -> int:
    """Bytes; `auto` is what is free now."""
    asked = config.run.memory_budget
    assert asked is not None
    given = None if asked == AUTO else parse_budget(asked)
    return free_bytes(device) if given is None else given


def free_bytes(device: torch.device) -> int:
    """For this process: what it holds already is among it on a CPU, where predictions count that too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(psutil.virtual_memory().available - _RESERVE, 0) + held_bytes()


def choose(
    config: TrainConfig,
    spec: FamilySpec,
    manifests: Mapping[str, Manifest],
    memory: MemoryPlan,
    budget_bytes: int,
    world_size: int,
    written: Container[str] = (),
) -> Fit:
    """What a start may choose. `memory`: the plan of the configuration as it is; `written` as of `Fitting`."""
    trained = [manifests[entry.id] for entry in config.image_datasets]

    def may(changes: Mapping[str, Any]) -> bool:
        if "train_batch_size" in changes:
            return _same_steps(config, trained, changes, world_size)
        if "base_model_precision" in changes:
            return _can_have(apply_choice(config, changes, spec), memory.device)
        return changes.keys() <= RECOMPUTING

    return fitting(config, spec, trained, memory, budget_bytes, may=may, written=written).find()


def fitting(
    config: TrainConfig,
    spec: FamilySpec,
    trained: list[Manifest],
    memory: MemoryPlan,
    budget_bytes: int,
    **limits: Any,
) -> Fitting:
    return Fitting(
        config,
        spec,
        partial(Shapes.of, trained, config),
        memory.device,
        as_it_is=memory.phases,
        budget_bytes=budget_bytes,
        held_bytes=memory.held_bytes if memory.device.type == "cpu" else 0,
        **limits,
    )


def apply_choice(config: TrainConfig, choice: Mapping[str, Any], spec: FamilySpec) -> TrainConfig:
    """Datasets with a larger encoding batch of their own get the chosen one."""
    datasets = [entry.model_dump(mode="json") for entry in config.datasets]
    for row in datasets:
        row |= {name: min(row[name], choice[name]) for name in _PER_ENTRY if name in choice and name in row}
    return TrainConfig.from_flat(config.to_flat() | dict(choice), datasets, spec)


def _training_fits(fit: Fit) -> bool:
    """Encoding is refused when it comes: a full cache needs none."""
    return all(fit.phases[phase] <= fit.budget_bytes for phase in fit.phases if phase not in ("text", "latents"))


def _can_have(config: TrainConfig, device: torch.device) -> bool:
    try:
        check_base(config, device)
    except UserError:
        return False
    return True


def _same_steps(config: TrainConfig, trained: list[Manifest], changes: Mapping[str, Any], world_size: int) -> bool:
    """Whether every step is of the same uses of the same samples, over the first epochs."""
    sizes = config.run.train_batch_size, changes["train_batch_size"]
    whole, split = (
        EpochPlan(
            [manifest.planned_set() for manifest in trained],
            seed=config.run.seed or 0,
            batch_size=size,
            world_size=world_size,
            uniform=config.data.data_backend_sampling == "uniform",
        )
        for size in sizes
    )
    old = config.run.gradient_accumulation_steps
    new = changes["gradient_accumulation_steps"]
    num_groups = whole.groups_before(_EPOCHS)
    if split.groups_before(_EPOCHS) != num_groups * sizes[0] // sizes[1]:
        return False
    before, after = whole.walk(), split.walk()
    return all(_uses(before, old) == _uses(after, new) for _ in range(-(-num_groups // old)))


def _uses(groups: Any, count: int) -> set[tuple[str, int, int]]:
    """Of the next step, which has so many groups."""
    return {(group.dataset_id, *entry) for group in islice(groups, count) for entry in group.entries}


def _written(choice: Mapping[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in choice.items()) or "nothing was changed"
