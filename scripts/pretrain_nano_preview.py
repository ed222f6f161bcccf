"""Make the tiny autoencoder that previews of a `nano` flavour are decoded with.

Its decoder learns what the flavour's own autoencoder makes of the latents of Fluent Emoji icons; its encoder is
there for the class only and was never trained.

    python -m scripts.pretrain_nano_preview --work build/nano --nano src/simpletuner/families/pixart_sigma/nano
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from scripts.icons import fetch_packages
from scripts.pretrain_pixart_nano import load_pictures, to_unit

STYLES = ("flat", "ink")


@torch.inference_mode()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents as the denoiser sees them, and what the autoencoder makes of them."""
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config["scaling_factor"]
    latents, decoded = [], []
    for part in pictures.split(64):
        mode = vae.encode(to_unit(part)).latent_dist.mode()
        latents.append((mode - shift) * scale)
        decoded.append(vae.decode(mode).sample.clamp(-1, 1))
    return torch.cat(latents), torch.cat(decoded)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--work", type=Path, required=True)
    reader.add_argument("--nano", type=Path, required=True, help="the flavour's diffusers folder")
    reader.add_argument("--seconds", type=float, default=240)
    given = reader.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    modules = fetch_packages(given.work, STYLES)
    pictures = torch.cat([load_pictures(modules, style)[0] for style in STYLES])
    vae = AutoencoderKL.from_pretrained(given.nano / "vae", torch_dtype=torch.float32).eval()
    latents, wanted = encode(vae, pictures)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(24, 24, 24, 24),
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1), latent_channels=latents.shape[1],
    )  # fmt: skip
    held = torch.arange(len(latents)) % 20 == 0
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=2e-3, weight_decay=0.0)
    started_at, steps, train = time.monotonic(), 0, torch.nonzero(~held)[:, 0]
    while (spent := time.monotonic() - started_at) < given.seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - spent / given.seconds)
        chosen = train[torch.randint(len(train), (16,))]
        # A sampler's early estimates are not yet pictures: some noise keeps the decoder from being surprised by them.
        noise = 0.1 * torch.rand(16, 1, 1, 1) * torch.randn_like(latents[chosen])
        loss = (tiny.decode(latents[chosen] + noise).sample - wanted[chosen]).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    with torch.inference_mode():
        error = (tiny.decode(latents[held]).sample - wanted[held]).square().mean()
    print(f"{steps} steps, {-10 * torch.log10(error / 4).item():.1f} dB from the autoencoder on held-out icons")
    tiny.to(torch.bfloat16).save_pretrained(given.nano / "preview")


if __name__ == "__main__":
    main()
