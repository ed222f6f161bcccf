"""A Flux of true width (3072, 24 heads) with few blocks and random weights, the other parts being nano's.

    python -m scripts.make_wide_flux build/wide-flux --blocks 2

For figures that need real shapes without the real weights: loading in 8 bits, memory, time of a step.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

NANO = Path(__file__).parent.parent / "src/simpletuner/families/flux/nano"


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("out", type=Path)
    reader.add_argument("--blocks", type=int, default=2, help="double blocks, and as many single ones")
    given = reader.parse_args()
    shutil.copytree(NANO, given.out)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    denoiser = FluxTransformer2DModel(
        in_channels=16, num_layers=given.blocks, num_single_layers=given.blocks, joint_attention_dim=128,
        pooled_projection_dim=64, guidance_embeds=True,
    )  # fmt: skip
    shutil.rmtree(given.out / "transformer")
    denoiser.save_pretrained(given.out / "transformer", max_shard_size="500MB")
    print(f"{sum(parameter.numel() for parameter in denoiser.parameters()):,} parameters in {given.out}")


if __name__ == "__main__":
    main()
