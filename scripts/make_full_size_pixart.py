"""Write a diffusers folder of PixArt Sigma 900M's real shapes with random weights: to try memory without a hub.

    python -m scripts.make_full_size_pixart FOLDER [--text-layers 1]

The denoiser and the autoencoder are full size; T5 has its real width of 4,096 and by default one layer of 24, since its
depth changes nothing that the trainer sees. The tokenizer is the nano model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

NANO = Path(__file__).parents[1] / "src" / "simpletuner" / "families" / "pixart_sigma" / "nano"
DENOISER = {
    "num_layers": 42, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
    "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 128, "patch_size": 2,
    "interpolation_scale": 2, "norm_type": "ada_norm_single", "use_additional_conditions": False,
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
    "scaling_factor": 0.13025,
}  # fmt: skip


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("folder", type=Path)
    reader.add_argument("--text-layers", type=int, default=1)
    given = reader.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    denoiser = PixArtTransformer2DModel(**DENOISER)
    print("denoiser parameters:", sum(parameter.numel() for parameter in denoiser.parameters()))
    denoiser.save_pretrained(given.folder / "transformer")
    del denoiser
    AutoencoderKL(**VAE).save_pretrained(given.folder / "vae")
    tokenizer = json.loads((NANO / "tokenizer" / "tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"]) + 16
    shape = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "feed_forward_proj": "gated-gelu"}
    T5EncoderModel(T5Config(vocab_size=size, num_layers=given.text_layers, **shape)).save_pretrained(
        given.folder / "text_encoder"
    )
    for part in ("tokenizer", "scheduler", "model_index.json"):
        source = NANO / part
        if source.is_dir():
            shutil.copytree(source, given.folder / part, dirs_exist_ok=True)
        else:
            shutil.copy(source, given.folder / part)


if __name__ == "__main__":
    main()
