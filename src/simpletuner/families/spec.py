"""All that the control world may know of a model family, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from simpletuner.config.option import OptionGroup


class Capability(StrEnum):
    """A kind of run that the family is built and tested for."""

    FULL = "full"
    LORA = "lora"
    LYCORIS = "lycoris"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """A repository and the option values that its weights ask for. `embedded`: ships inside the package."""

    repository: str
    licence: str
    native_resolution: int
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    embedded: bool = False
    alignment: int = 64
    """Pixels that both sides of a training target are multiples of."""
    tokens: int | None = None
    """Text tokens, where they are not the family's."""
    preview_decoder: str | None = None
    """Tiny autoencoder of its latents, where it is not the family's."""
    edits_references: bool = False
    """Whether every sample must come with a reference picture."""
    reference_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) in pixels that a picture from elsewhere is brought to before it is edited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGeometry:
    channels: int
    stride: int
    patch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSlot:
    """A text encoder's place: tokens, width of an embedding, whether attention is masked, a pooled vector or not."""

    encoder: str
    length: int
    width: int
    masked: bool
    pooled: bool = False


class NoFamilyOptions(OptionGroup):
    """For a family that adds no options of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySpec:
    name: str
    title: str
    objective: Literal["diffusion", "flow"]
    flavours: Mapping[str, Flavour]
    default_flavour: str
    latent: LatentGeometry
    text: tuple[TextSlot, ...]
    supports: frozenset[Capability]
    preview_decoder: str
    """Hub id of the tiny autoencoder that images are shown with while they are sampled."""
    implementation: str
    """`module:Class` of the training half; imported by the trainer only."""
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Option values of every flavour; a flavour's own win over them."""
    options: type[OptionGroup] = NoFamilyOptions
    unquantised: tuple[str, ...] = ()
    """Patterns of the Linear modules that stay as they are in a quantised base."""
    refused_precisions: tuple[str, ...] = ()
    """Of `base_model_precision`."""
    attention_classes: tuple[str, ...] = ()
    """Classes that `Attention` stands for in a LyCORIS preset."""
    lora_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Presets of a LoRA's modules; `all` is the default one."""

    def layer_values(self, flavour: str) -> dict[str, Any]:
        """The `flavour` layer of option resolution."""
        chosen = self.flavours[flavour]
        native = chosen.native_resolution
        return {
            "model_flavour": flavour,
            "pretrained_model_name_or_path": chosen.repository,
            "validation_resolution": f"{native}x{native}",
            "aspect_bucket_alignment": chosen.alignment,
            **self.values,
            **chosen.values,
        }
