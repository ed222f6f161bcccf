"""Settings with which a run stays inside a budget of memory, found by rehearsing on shapes. training.md §10.4."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from simpletuner.config.dataset_options import ImageDataset, TextEmbeds
from simpletuner.config.model_options import QUANTISED
from simpletuner.config.prompt import parse_resolutions
from simpletuner.config.train_config import TrainConfig
from simpletuner.families.spec import FamilySpec
from simpletuner.train.memory import Phase, gigabytes
from simpletuner.train.rehearsal import Rehearsal, Shapes, state_ratio

_SMALLEST_DRAWN = 256
"""Validation pictures are not proposed with a shorter side than this, in pixels."""
_TRAINING: tuple[Phase, ...] = ("step", "validation", "save")
_GRID = 64
"""Proposed sides are multiples of it."""


@dataclass(frozen=True, slots=True)
class Fit:
    settings: Mapping[str, Any]
    """Option (bare name) → proposed value; empty where the configuration fits as it is."""
    costs: tuple[str, ...]
    phases: Mapping[Phase, int]
    """Predicted peaks with those settings."""
    budget_bytes: int

    @property
    def fits(self) -> bool:
        return max(self.phases.values()) <= self.budget_bytes

    def as_facts(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "budget_bytes": self.budget_bytes,
            "predicted_bytes": max(self.phases.values()),
            "phases": dict(self.phases),
            "settings": {f"--{name}": value for name, value in self.settings.items()},
            "costs": list(self.costs),
            "message": " ".join([str(self), *self.costs]),
        }

    def __str__(self) -> str:
        budget, needed = gigabytes(self.budget_bytes), gigabytes(max(self.phases.values()))
        written = " ".join(f"--{name} {_shown(value)}" for name, value in self.settings.items())
        if not self.fits:
            largest = max(self.phases, key=lambda phase: self.phases[phase])
            tried = f" even with {written}" if written else ""
            return f"Nothing that we know to change fits into {budget}: {largest!r} needs {needed}{tried}."
        if not written:
            return f"Fits into {budget} as it is: the peak is {needed}."
        return f"Fits into {budget} with {written}: the peak is {needed}."


class _Rung(NamedTuple):
    """A change, and what it costs."""

    changes: dict[str, Any]
    cost: str


_ATTENTION_KEPT: dict[str, Any] = {"gradient_checkpointing": True, "gradient_checkpointing_keeps": "attention"}
_ALL_RECOMPUTED: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_keeps": "nothing",
    "gradient_checkpointing_interval": None,
}
RECOMPUTING = frozenset(_ALL_RECOMPUTED)
"""Options that change nothing but memory and time."""
_DEAR = 6_000
"""Latent tokens from which on keeping attention saves more time than it takes to look at each operation for it."""


class Fitting:
    """Looks for the cheapest changes of one configuration. A change stays only where it makes less what is too much."""

    def __init__(
        self,
        config: TrainConfig,
        spec: FamilySpec,
        shapes_of: Callable[[int | None], Shapes],
        device: torch.device,
        *,
        as_it_is: Mapping[Phase, int],
        budget_bytes: int,
        held_bytes: int,
        may: Callable[[Mapping[str, Any]], bool] = lambda changes: True,
        written: Container[str] = (),
    ) -> None:
        """`shapes_of`: the shapes of the data where at most so many pictures are encoded at once.

        `as_it_is`: the phases of the configuration, as rehearsed. `held_bytes`: what the process holds anyway, where
        that counts too. `may`: whether so many changes of training may be proposed. `written`: options that somebody
        set; recomputing is left out where it is not one of them and there is room.
        """
        self._config = config
        self._spec = spec
        self._shapes_of = shapes_of
        self._device = device
        self._as_it_is = as_it_is
        self._budget = budget_bytes
        self._held = held_bytes
        self._may = may
        self._written = written

    def find(self) -> Fit:
        rehearsal = Rehearsal(self._config, self._spec, self._shapes_of(None))
        text_batch, text = self._encoding("text", self._config.text_embeds.text_encoder_batch_size, rehearsal.text)
        picture_batch, latents = self._encoding("latents", self._vae_batch_size(), self._latents)
        training, rungs = self._training()
        if text_batch is not None:
            rungs.append(self._slower("Captions", "text_encoder_batch_size", text_batch, [self._config.text_embeds]))
        if picture_batch is not None:
            rungs.append(self._slower("Pictures", "vae_batch_size", picture_batch, self._config.image_datasets))
        settings = {name: value for rung in rungs for name, value in rung.changes.items()}
        compute = self._config.compute
        for name in RECOMPUTING & settings.keys():
            if settings[name] == getattr(compute, name):
                del settings[name]
        phases: dict[Phase, int] = {"text": text, "latents": latents, **training}
        return Fit(settings, tuple(dict.fromkeys(rung.cost for rung in rungs)), phases, self._budget)

    def _encoding(self, phase: Phase, batch_size: int, peak_of: Callable[[int], int]) -> tuple[int | None, int]:
        """The largest half, quarter … of a batch that fits, None for the whole; and its peak."""
        count, needed = batch_size, self._held + self._as_it_is[phase]
        while needed > self._budget and count > 1:
            count //= 2
            needed = self._held + peak_of(count)
        return (None if count == batch_size else count), needed

    def _slower(self, what: str, option: str, count: int, entries: Sequence[ImageDataset | TextEmbeds]) -> _Rung:
        """An entry whose value is not the option's has its own, which goes before the option."""
        common = getattr(self._config.data, option)
        own = [entry.id for entry in entries if getattr(entry, option) != common]
        there = f" Change it in the dataset file too, for {', '.join(own)}." if own else ""
        return _Rung({option: count}, f"{what} are encoded a little slower.{there}")

    def _vae_batch_size(self) -> int:
        return max(entry.vae_batch_size for entry in self._config.image_datasets)

    def _latents(self, count: int) -> int:
        return Rehearsal(self._config, self._spec, self._shapes_of(count)).latents()

    def _training(self) -> tuple[dict[Phase, int], list[_Rung]]:
        phases, kept = self._counted(self._config, self._as_it_is), list[_Rung]()
        changes: dict[str, Any] = {}
        if self._fits(phases):
            return self._faster(phases)
        for rung in self._rungs():
            over: set[Phase] = {phase for phase, needed in phases.items() if needed > self._budget}
            if not over:
                break
            if not self._may(rung.changes):
                continue
            tried = self._rehearse(self._changed(changes | rung.changes))
            if sum(tried[phase] for phase in over) < sum(phases[phase] for phase in over):
                phases, changes = tried, changes | rung.changes
                kept = [other for other in kept if not other.changes.keys() <= rung.changes.keys()]
                kept.append(rung)
        return phases, kept

    def _fits(self, phases: Mapping[Phase, int]) -> bool:
        return max(phases.values()) <= self._budget

    def _faster(self, phases: dict[Phase, int]) -> tuple[dict[Phase, int], list[_Rung]]:
        """What recomputes the least of all that fits."""
        if self._config.compute.gradient_checkpointing and not any(name in self._written for name in RECOMPUTING):
            for rung in self._less_recomputed():
                tried = self._rehearse(self._changed(rung.changes))
                if self._fits(tried):
                    return tried, [rung]
        return phases, []

    def _less_recomputed(self) -> Iterator[_Rung]:
        yield _Rung({"gradient_checkpointing": False}, "Nothing is recomputed: a step is about a quarter shorter.")
        if self._attention_is_dear():
            yield _Rung(_ATTENTION_KEPT, "Attention is not recomputed: a step is about a tenth shorter.")

    def _attention_is_dear(self) -> bool:
        """A compiler looks for it once; otherwise each operation of a block is looked at, in Python, each time."""
        shapes, latent = self._shapes_of(None), self._spec.latent
        pixels = sum(width * height for width, height in (shapes.trained, *shapes.references))
        return pixels >= _DEAR * (latent.stride * latent.patch) ** 2 or self._config.compute.dynamo_backend != "no"

    def _rungs(self) -> Iterator[_Rung]:
        """From what costs nothing but time to what changes the result."""
        config = self._config
        if not config.compute.gradient_checkpointing and self._attention_is_dear():
            yield _Rung(_ATTENTION_KEPT, "Recomputing all but attention makes a step about a quarter longer.")
        if any(getattr(config.compute, name) != value for name, value in _ALL_RECOMPUTED.items()):
            yield _Rung(_ALL_RECOMPUTED, "Recomputing makes a step about a third longer.")
        batch, accumulation = config.run.train_batch_size, config.run.gradient_accumulation_steps
        # Gradients that are released at once cannot be accumulated.
        smallest = batch if config.optimizer.optimizer_release_gradients else 1
        for smaller in (part for part in range(batch - 1, smallest - 1, -1) if batch % part == 0):
            yield _Rung(
                {"train_batch_size": smaller, "gradient_accumulation_steps": accumulation * batch // smaller},
                "Smaller micro-batches, accumulated: the same mathematics, somewhat slower.",
            )
        if config.model.model_type == "lora" and config.precision.base_model_precision not in QUANTISED:
            yield _Rung({"base_model_precision": "int8-quanto"}, "The frozen base is rounded to 8 bits.")
        yield from self._smaller_drawings()
        if config.precision.use_ema:
            yield _Rung({"use_ema": False}, "There is no moving average of the weights.")

    def _smaller_drawings(self) -> Iterator[_Rung]:
        sizes = parse_resolutions(self._config.validation.validation_resolution)
        while min(min(size) for size in sizes) >= 2 * _SMALLEST_DRAWN:
            sizes = [(width // 2 // _GRID * _GRID, height // 2 // _GRID * _GRID) for width, height in sizes]
            written = ",".join(f"{width}x{height}" for width, height in sizes)
            yield _Rung({"validation_resolution": written}, "Validation pictures are smaller.")

    def _changed(self, changes: dict[str, Any]) -> TrainConfig:
        datasets = [entry.model_dump(mode="json") for entry in self._config.datasets]
        return TrainConfig.from_flat(self._config.to_flat() | changes, datasets, self._spec)

    def _rehearse(self, config: TrainConfig) -> dict[Phase, int]:
        rehearsal = Rehearsal(config, self._spec, self._shapes_of(None))
        return self._counted(config, rehearsal.training(state_ratio(config, self._device)).phases)

    def _counted(self, config: TrainConfig, phases: Mapping[Phase, int]) -> dict[Phase, int]:
        """Of the phases of training, those that the run has, with what is held."""
        wanted: tuple[Phase, ...] = ("step", "save") if config.validation.validation_disable else _TRAINING
        return {phase: self._held + phases[phase] for phase in wanted}


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
