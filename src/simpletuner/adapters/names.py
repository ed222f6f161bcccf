"""How each family's modules are called in adapter files: diffusers' dotted names, and kohya's names of fused layers.

diffusers keeps q, k and v apart; the original Flux code, whose names kohya and ComfyUI use, fuses them into one
matrix. A table here is all that a family has to state for its adapters to be read and converted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from simpletuner.errors import UserError

MOST_BLOCKS = 100
"""Block numbers that names are spelled out for; the largest Flux has 38."""


@dataclass(frozen=True, slots=True)
class Part:
    """One denoiser module inside a fused layer. `rows`: its output rows, in multiples of the layer's input width."""

    module: str
    rows: int = 1


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer in kohya's spelling. `swapped`: its two halves of output rows stand the other way round in diffusers."""

    name: str
    parts: tuple[Part, ...]
    swapped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyNames:
    """`{i}` in a name stands for a block's number."""

    family: str
    architecture: str
    """Our value of the header's `modelspec.architecture`."""
    modules: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()
    """Empty: kohya has no names for this family."""
    has_pipeline_loader: bool = False
    """diffusers' pipeline has `load_lora_weights`; else the file is loaded by peft, on the denoiser."""
    comfyui_underscored: bool = False
    """ComfyUI also knows `lycoris_<module with _>` for this family, not only `transformer.<module>`."""

    def all_modules(self) -> frozenset[str]:
        """Every dotted name that a denoiser of this family may have."""
        return frozenset(_numbered([*self.modules, *(part.module for layer in self.layers for part in layer.parts)]))

    def all_layers(self) -> dict[str, Layer]:
        """kohya's names without `lora_unet_` → layer, every block spelled out."""
        return {
            layer.name.format(i=i): Layer(
                layer.name.format(i=i),
                tuple(Part(part.module.format(i=i), part.rows) for part in layer.parts),
                layer.swapped,
            )
            for layer in self.layers
            for i in range(MOST_BLOCKS)
        }


def one(name: str, module: str) -> Layer:
    return Layer(name, (Part(module),))


def qkv(name: str, *modules: str) -> Layer:
    return Layer(name, tuple(Part(module) for module in modules))


DOUBLE, SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
TIME = "time_text_embed"

FLUX = FamilyNames(
    family="flux",
    architecture="flux-1-dev/lora",
    has_pipeline_loader=True,
    comfyui_underscored=True,
    layers=(
        *(
            layer
            for side, attention, out, norm, feed in (
                ("img", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0", "norm1", "ff"),
                (
                    "txt",
                    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                    "attn.to_add_out",
                    "norm1_context",
                    "ff_context",
                ),
            )
            for layer in (
                qkv(f"double_blocks_{{i}}_{side}_attn_qkv", *(f"{DOUBLE}.{name}" for name in attention)),
                one(f"double_blocks_{{i}}_{side}_attn_proj", f"{DOUBLE}.{out}"),
                one(f"double_blocks_{{i}}_{side}_mlp_0", f"{DOUBLE}.{feed}.net.0.proj"),
                one(f"double_blocks_{{i}}_{side}_mlp_2", f"{DOUBLE}.{feed}.net.2"),
                one(f"double_blocks_{{i}}_{side}_mod_lin", f"{DOUBLE}.{norm}.linear"),
            )
        ),
        Layer(
            "single_blocks_{i}_linear1",
            (
                Part(f"{SINGLE}.attn.to_q"),
                Part(f"{SINGLE}.attn.to_k"),
                Part(f"{SINGLE}.attn.to_v"),
                Part(f"{SINGLE}.proj_mlp", rows=4),
            ),
        ),
        one("single_blocks_{i}_linear2", f"{SINGLE}.proj_out"),
        one("single_blocks_{i}_modulation_lin", f"{SINGLE}.norm.linear"),
        one("img_in", "x_embedder"),
        one("txt_in", "context_embedder"),
        one("time_in_in_layer", f"{TIME}.timestep_embedder.linear_1"),
        one("time_in_out_layer", f"{TIME}.timestep_embedder.linear_2"),
        one("vector_in_in_layer", f"{TIME}.text_embedder.linear_1"),
        one("vector_in_out_layer", f"{TIME}.text_embedder.linear_2"),
        one("guidance_in_in_layer", f"{TIME}.guidance_embedder.linear_1"),
        one("guidance_in_out_layer", f"{TIME}.guidance_embedder.linear_2"),
        one("final_layer_linear", "proj_out"),
        # The original has (shift, scale), diffusers (scale, shift).
        Layer("final_layer_adaLN_modulation_1", (Part("norm_out.linear"),), swapped=True),
    ),
)

PIXART_SIGMA = FamilyNames(
    family="pixart_sigma",
    architecture="pixart-sigma/lora",
    modules=(
        *(
            f"{DOUBLE}.{attention}.{name}"
            for attention in ("attn1", "attn2")
            for name in ("to_q", "to_k", "to_v", "to_out.0")
        ),
        f"{DOUBLE}.ff.net.0.proj",
        f"{DOUBLE}.ff.net.2",
        "pos_embed.proj",
        *(
            f"adaln_single.emb.{name}_embedder.linear_{number}"
            for name in ("timestep", "resolution", "aspect_ratio")
            for number in (1, 2)
        ),
        "adaln_single.linear",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
        "proj_out",
    ),
)

FAMILIES: Mapping[str, FamilyNames] = {names.family: names for names in (FLUX, PIXART_SIGMA)}


def names_of(family: str) -> FamilyNames:
    """Raises UserError `unknown_family`."""
    if family not in FAMILIES:
        raise UserError(
            "unknown_family",
            f"Adapters of the model family {family!r} cannot be converted.",
            hint=f"Known: {', '.join(FAMILIES)}.",
        )
    return FAMILIES[family]


def underscored(modules: Collection[str]) -> dict[str, tuple[str, ...]]:
    """`a_b_c` → the modules it may stand for: more than one is ambiguous."""
    found: dict[str, tuple[str, ...]] = {}
    for module in sorted(modules):
        short = module.replace(".", "_")
        found[short] = (*found.get(short, ()), module)
    return found


def _numbered(templates: Iterable[str]) -> Iterable[str]:
    for template in templates:
        for i in range(MOST_BLOCKS if "{i}" in template else 1):
            yield template.format(i=i)
