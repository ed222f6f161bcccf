"""Flux.1: a rectified-flow transformer with T5 and pooled CLIP text; Kontext edits references. training.md §4.4."""

from __future__ import annotations

from pathlib import Path

from simpletuner.families.spec import Capability, FamilySpec, Flavour, LatentGeometry, TextSlot

_DEV = "FLUX.1 [dev] Non-Commercial License"
_APACHE = "Apache-2.0"

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_CONTEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", *_CONTEXT_FEED_FORWARD, "proj_mlp")
_OUT = ("single_transformer_blocks.*.proj_out",)
_ALL = (*_ATTENTION, *_CONTEXT)

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "all": _ALL,
    "mmdit": _ALL,
    "context": _CONTEXT,
    "context+ffs": (*_CONTEXT, *_CONTEXT_FEED_FORWARD),
    "all+ffs": (*_ALL, *_FEED_FORWARD, *_OUT),
    "all+ffs+embedder": (*_ALL, *_FEED_FORWARD, *_OUT, "x_embedder"),
    "ai-toolkit": (*_ALL, *_FEED_FORWARD, *_OUT, "norm.linear", "norm1.linear", "norm1_context.linear"),
    "tiny": ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
    "nano": ("single_transformer_blocks.7.proj_out",),
}
"""Preset → module names: the end of a name, or with a `*` or a number a pattern of the whole name."""

# As in diffusers' FluxKontextPipeline: the sizes that the model was trained on.
_WIDE = ((1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
         (1568, 672))  # fmt: skip
_KONTEXT_SIZES = (*((height, width) for width, height in reversed(_WIDE[1:])), *_WIDE)

SPEC = FamilySpec(
    name="flux",
    title="Flux",
    objective="flow",
    default_flavour="krea",
    flavours={
        "dev": Flavour(repository="black-forest-labs/FLUX.1-dev", licence=_DEV, native_resolution=1024),
        "krea": Flavour(repository="black-forest-labs/FLUX.1-Krea-dev", licence=_DEV, native_resolution=1024),
        "schnell": Flavour(
            repository="black-forest-labs/FLUX.1-schnell",
            licence=_APACHE,
            native_resolution=1024,
            tokens=256,
            values={"validation_num_inference_steps": 4, "validation_guidance": 0.0},
        ),
        "kontext": Flavour(
            repository="black-forest-labs/FLUX.1-Kontext-dev",
            licence=_DEV,
            native_resolution=1024,
            edits_references=True,
            reference_sizes=_KONTEXT_SIZES,
            values={"validation_guidance": 2.5},
        ),
        "nano": Flavour(
            repository=str(Path(__file__).parent / "nano"),
            licence=_APACHE,
            native_resolution=64,
            embedded=True,
            alignment=16,
            tokens=32,
            preview_decoder=str(Path(__file__).parent / "nano/preview"),
            edits_references=True,
            reference_sizes=((48, 96), (48, 80), (64, 64), (80, 48), (96, 48)),
            values={
                "resolution": 64,
                "validation_num_inference_steps": 16,
                "validation_guidance": 2.5,
                "flow_schedule_shift": 1.6,
                "max_grad_norm": 1.0,
            },
        ),
    },
    latent=LatentGeometry(channels=16, stride=8, patch=2),
    text=(
        TextSlot(encoder="clip", length=77, width=768, masked=False, pooled=True),
        TextSlot(encoder="t5", length=512, width=4096, masked=False),
    ),
    supports=frozenset({Capability.FULL, Capability.LORA, Capability.LYCORIS}),
    values={"validation_guidance": 3.5},
    preview_decoder="madebyollin/taef1",
    unquantised=("x_embedder", "context_embedder", "time_text_embed.*", "norm_out.*", "proj_out"),
    attention_classes=("FluxAttention",),
    lora_targets=LORA_TARGETS,
    implementation="simpletuner.families.flux.family:Flux",
)
