"""PixArt Sigma: a DiT with T5 text, epsilon prediction and an SDXL-type autoencoder. training.md §4.3."""

from __future__ import annotations

from pathlib import Path

from simpletuner.families.spec import Capability, FamilySpec, Flavour, LatentGeometry, TextSlot

_OPENRAIL = "CreativeML Open RAIL++-M"
_APACHE = "Apache-2.0"

SPEC = FamilySpec(
    name="pixart_sigma",
    title="PixArt Sigma",
    objective="diffusion",
    default_flavour="900M-1024-v0.6",
    flavours={
        "900M-1024-v0.6": Flavour(
            repository="terminusresearch/pixart-900m-1024-ft-v0.6", licence=_OPENRAIL, native_resolution=1024
        ),
        "900M-1024-v0.7-stage1": Flavour(
            repository="terminusresearch/pixart-900m-1024-ft-v0.7-stage1",
            licence=_OPENRAIL,
            native_resolution=1024,
            values={"refiner_training": True, "refiner_training_invert_schedule": True},
        ),
        "900M-1024-v0.7-stage2": Flavour(
            repository="terminusresearch/pixart-900m-1024-ft-v0.7-stage2",
            licence=_OPENRAIL,
            native_resolution=1024,
            values={"refiner_training": True},
        ),
        "600M-512": Flavour(
            repository="PixArt-alpha/PixArt-Sigma-XL-2-512-MS", licence=_OPENRAIL, native_resolution=512
        ),
        "600M-1024": Flavour(
            repository="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", licence=_OPENRAIL, native_resolution=1024
        ),
        "600M-2048": Flavour(
            repository="PixArt-alpha/PixArt-Sigma-XL-2-2K-MS", licence=_OPENRAIL, native_resolution=2048
        ),
        "nano": Flavour(
            repository=str(Path(__file__).parent / "nano"),
            licence=_APACHE,
            native_resolution=64,
            embedded=True,
            alignment=16,
            preview_decoder=str(Path(__file__).parent / "nano/preview"),
            values={
                "resolution": 64,
                "validation_num_inference_steps": 20,
                "validation_guidance": 3.0,
                "max_grad_norm": 1.0,
            },
        ),
    },
    latent=LatentGeometry(channels=4, stride=8, patch=2),
    text=(TextSlot(encoder="t5", length=300, width=4096, masked=True),),
    supports=frozenset({Capability.FULL, Capability.LORA, Capability.LYCORIS}),
    values={"max_grad_norm": 0.01, "validation_guidance": 4.5},
    preview_decoder="madebyollin/taesdxl",
    unquantised=("pos_embed.*", "adaln_single.*", "caption_projection.*", "proj_out"),
    refused_precisions=("fp8-quanto",),
    attention_classes=("Attention",),
    lora_targets={"all": ("to_k", "to_q", "to_v", "to_out.0")},
    implementation="simpletuner.families.pixart_sigma.family:PixArtSigma",
)
