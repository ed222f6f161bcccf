"""The whole of what a run is asked to do: nested in code, flat on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, SerializeAsAny

from simpletuner.config.compute_options import ComputeOptions
from simpletuner.config.dataset_options import (
    ConditioningDataset,
    Dataset,
    EvalDataset,
    ImageDataset,
    PictureDataset,
    TextEmbeds,
)
from simpletuner.config.flux_options import FluxOptions
from simpletuner.config.fsdp_options import FsdpOptions
from simpletuner.config.model_options import AdapterOptions, ModelOptions, PrecisionOptions
from simpletuner.config.option import OptionField, OptionGroup, fields_of
from simpletuner.config.publishing_options import PublishingOptions
from simpletuner.config.training_options import (
    CheckpointOptions,
    DataOptions,
    LossOptions,
    OptimizerOptions,
    RunOptions,
)
from simpletuner.config.validation_options import ValidationOptions
from simpletuner.families.spec import FamilySpec, NoFamilyOptions

GROUPS: dict[str, type[OptionGroup]] = {
    "model": ModelOptions,
    "adapter": AdapterOptions,
    "flux": FluxOptions,
    "precision": PrecisionOptions,
    "compute": ComputeOptions,
    "fsdp": FsdpOptions,
    "run": RunOptions,
    "optimizer": OptimizerOptions,
    "loss": LossOptions,
    "checkpoint": CheckpointOptions,
    "data": DataOptions,
    "validation": ValidationOptions,
    "publishing": PublishingOptions,
}


class TrainConfig(BaseModel):
    """Checked, frozen, complete: what the trainer reads and nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelOptions
    adapter: AdapterOptions
    flux: FluxOptions
    precision: PrecisionOptions
    compute: ComputeOptions
    fsdp: FsdpOptions
    run: RunOptions
    optimizer: OptimizerOptions
    loss: LossOptions
    checkpoint: CheckpointOptions
    data: DataOptions
    validation: ValidationOptions
    publishing: PublishingOptions
    family: SerializeAsAny[OptionGroup]
    datasets: list[Dataset]

    @classmethod
    def from_flat(cls, values: Mapping[str, Any], datasets: list[Any], spec: FamilySpec) -> Self:
        """Build from bare names. Raises pydantic's ValidationError for what `resolve` would have refused."""
        groups: dict[str, dict[str, Any]] = {name: {} for name in (*GROUPS, "family")}
        for option in option_fields(spec.options).values():
            if option.name in values:
                groups[option.group][option.name] = values[option.name]
        family = spec.options.model_validate(groups.pop("family"))
        return cls.model_validate({**groups, "family": family, "datasets": datasets})

    def to_flat(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name in (*GROUPS, "family"):
            flat |= getattr(self, name).model_dump(mode="json")
        return flat

    def without_secrets(self) -> dict[str, Any]:
        """Flat, for whoever is told of a run, such as a tracker."""
        secret = {option.name for option in option_fields().values() if option.ui.secret}
        return {name: value for name, value in self.to_flat().items() if name not in secret}

    def pointer_of(self, entry: PictureDataset) -> str:
        """JSON pointer of an entry: the file's order is kept."""
        return f"/datasets/{[known.id for known in self.datasets].index(entry.id)}"

    @property
    def picture_datasets(self) -> list[PictureDataset]:
        """All that are looked through before a run."""
        return [*self.image_datasets, *self.eval_datasets, *self.conditioning_datasets]

    @property
    def image_datasets(self) -> list[ImageDataset]:
        return [entry for entry in self.datasets if isinstance(entry, ImageDataset) and not entry.disabled]

    @property
    def eval_datasets(self) -> list[EvalDataset]:
        return [entry for entry in self.datasets if isinstance(entry, EvalDataset) and not entry.disabled]

    @property
    def conditioning_datasets(self) -> list[ConditioningDataset]:
        """Those that a dataset in use names, in file order."""
        used = {name for entry in (*self.image_datasets, *self.eval_datasets) for name in entry.conditioning_data}
        return [entry for entry in self.datasets if isinstance(entry, ConditioningDataset) and entry.id in used]

    @property
    def text_embeds(self) -> TextEmbeds:
        """The default text cache; `resolve` sees to it that there is exactly one."""
        return next(entry for entry in self.datasets if isinstance(entry, TextEmbeds) and entry.default)


@cache
def option_fields(family_options: type[OptionGroup] = NoFamilyOptions) -> Mapping[str, OptionField]:
    """Every typed option by bare name, the family's own last."""
    fields = [field for name, group in GROUPS.items() for field in fields_of(group, name)]
    fields += fields_of(family_options, "family")
    return {field.name: field for field in fields}
