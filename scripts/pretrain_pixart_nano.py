"""Make the `nano` flavour of PixArt Sigma: train it from nothing on Fluent Emoji icons, save a diffusers folder.

    python -m scripts.pretrain_pixart_nano --work build/nano --out src/simpletuner/families/pixart_sigma/nano

Four parts of the real classes: T5Tokenizer (unigram, trained on the captions), T5EncoderModel and
PixArtTransformer2DModel (trained together, epsilon prediction, min-SNR 5), AutoencoderKL (trained first).
What it saw, how long it took and what it can do: docs/nano-models.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from scripts.icons import draw, fetch_packages, read_icons

SIZE = 64
TEMPLATES = ("{}", "{}", "a flat icon of {}", "{}, flat icon", "an icon of {}")


def load_pictures(modules: Path, style: str, *, tones: bool = False) -> tuple[torch.Tensor, list[str]]:
    """uint8 (N, 3, 64, 64) and the names as words."""
    rows = [(name, np.asarray(draw(svg, SIZE))) for name, svg in read_icons(modules, style, tones=tones)]
    pictures = torch.from_numpy(np.stack([row[1] for row in rows])).permute(0, 3, 1, 2).contiguous()
    return pictures, [name.replace("-", " ") for name, _ in rows]


def load_3d(modules: Path) -> torch.Tensor:
    pictures: list[np.ndarray] = []
    for path in sorted((modules / "@lobehub/fluent-emoji-3d/assets").glob("*.webp")):
        picture = Image.open(path).convert("RGBA")
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture)
        pictures.append(np.asarray(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.float() / 127.5 - 1


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def train_vae(pictures: torch.Tensor, weights: torch.Tensor, seconds: float, before: Path | None) -> AutoencoderKL:
    """`weights` say how often each picture is drawn."""
    vae = AutoencoderKL.from_pretrained(before / "vae", torch_dtype=torch.float32) if before else build_vae()
    vae = vae.to(memory_format=torch.channels_last).train()
    print("vae parameters", sum(p.numel() for p in vae.parameters()), flush=True)
    is_train = torch.arange(len(pictures)) % 40 != 0
    held_out, train, weights = pictures[~is_train], pictures[is_train], weights[is_train]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    shadow = {key: value.clone() for key, value in vae.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    start, step = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * elapsed / seconds)) + 1e-5
        index = torch.multinomial(weights, 16, generator=generator)
        x = augment(to_unit(train[index]), generator).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator=generator)).sample
        loss = picture_loss(y, x) + 1e-5 * posterior.kl().mean() / 256
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        for key, value in vae.state_dict().items():
            shadow[key].lerp_(value, 1 - decay)
        step += 1
        if step % 250 == 0:
            print(f"vae step {step} {elapsed:.0f}s loss {loss.item():.4f} psnr {psnr(vae, held_out):.2f}", flush=True)
    vae.load_state_dict(shadow)
    with torch.no_grad():
        z = torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in pictures[::4].split(64)])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    print(f"vae done: {step} steps, psnr {psnr(vae, held_out):.2f}, scaling {vae.config['scaling_factor']}", flush=True)
    return vae.eval()


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flips, shifts and inverted colours, so that the autoencoder is not tied to icons on white."""
    if torch.rand((), generator=generator) < 0.5:
        x = x.flip(-1)
    shift = torch.randint(-8, 9, (2,), generator=generator).tolist()
    x = x.roll(shift, (-2, -1))
    if torch.rand((), generator=generator) < 0.15:
        x = -x
    if torch.rand((), generator=generator) < 0.3:
        x = x[:, torch.randperm(3, generator=generator)]
    return x


def picture_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values, edges, and colour differences: without the last, few steps spend every channel on brightness."""
    edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    colours = F.l1_loss(y - y.roll(1, 1), x - x.roll(1, 1))
    return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 0.5 * edges + 1.5 * colours


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    x = to_unit(pictures)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (y - x).square().mean((1, 2, 3)))).mean().item()


def train_tokenizer(names: list[str], folder: Path) -> T5Tokenizer:
    """A unigram model over the captions and all printable ASCII, loaded through the real class."""
    corpus = [template.format(name) for name in names for template in TEMPLATES]
    corpus += [
        "a photo of",
        "a drawing of",
        "high contrast ink drawing of",
        "black and white",
        "a portrait of a person",
    ]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=2000, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(corpus, trainer)
    pieces = [(piece, float(score)) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    known = {piece for piece, _ in pieces}
    lowest = min(score for _, score in pieces) - 10
    pieces += [(letter, lowest) for letter in alphabet if letter not in known]
    built = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=300)
    built.save_pretrained(folder)
    loaded = T5Tokenizer.from_pretrained(folder)
    print("tokenizer", len(loaded), loaded.tokenize("a flat icon of red apple"), flush=True)
    return loaded


def build_denoiser(vocabulary: int) -> tuple[T5EncoderModel, PixArtTransformer2DModel]:
    text = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=2,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, relative_attention_num_buckets=32,
        )
    )  # fmt: skip
    denoiser = PixArtTransformer2DModel(
        num_attention_heads=5, attention_head_dim=32, num_layers=5, cross_attention_dim=160, caption_channels=128,
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, use_additional_conditions=False,
        interpolation_scale=1, norm_type="ada_norm_single",
    )  # fmt: skip
    return text, denoiser


def train_denoiser(
    latents: torch.Tensor, names: list[str], tokenizer: T5Tokenizer, seconds: float, before: Path | None
) -> tuple[T5EncoderModel, PixArtTransformer2DModel]:
    torch.manual_seed(1)
    text, denoiser = build_denoiser(len(tokenizer))
    if before:
        text = T5EncoderModel.from_pretrained(before / "text_encoder", dtype=torch.float32).train()
        denoiser = PixArtTransformer2DModel.from_pretrained(before / "transformer", torch_dtype=torch.float32).train()
    parameters = [*text.parameters(), *denoiser.parameters()]
    print("text", sum(p.numel() for p in text.parameters()), "denoiser", sum(p.numel() for p in denoiser.parameters()))
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-2)
    shadow = [p.detach().clone() for p in parameters]
    generator = torch.Generator().manual_seed(2)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    weight = (alphas / (1 - alphas)).clamp(max=5) / (alphas / (1 - alphas))
    start, step, mean = time.monotonic(), 0, 0.0
    batch = 64
    while (elapsed := time.monotonic() - start) < seconds:
        rate = 1e-3 * min(1, (step + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * elapsed / seconds)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = torch.randint(len(latents), (batch,), generator=generator)
        captions = [
            "" if torch.rand((), generator=generator) < 0.1
            else TEMPLATES[int(torch.randint(len(TEMPLATES), (), generator=generator))].format(names[i])
            for i in index.tolist()
        ]  # fmt: skip
        x = latents[index]
        t = (
            (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch * 1000
        ).long()
        noise = torch.randn(x.shape, generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        tokens = tokenizer(captions, padding="longest", return_tensors="pt")
        states = text(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        predicted = denoiser(
            a.sqrt() * x + (1 - a).sqrt() * noise,
            encoder_hidden_states=states,
            encoder_attention_mask=tokens.attention_mask,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[:, :4]
        loss = ((predicted - noise).square().mean((1, 2, 3)) * weight[t]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(shadow, [p.detach() for p in parameters], 1 - min(0.999, (1 + step) / (10 + step)))
        mean = loss.item() if step == 0 else 0.99 * mean + 0.01 * loss.item()
        step += 1
        if step % 500 == 0:
            print(f"denoiser step {step} {elapsed:.0f}s loss {mean:.4f}", flush=True)
    with torch.no_grad():
        for parameter, average in zip(parameters, shadow, strict=True):
            parameter.copy_(average)
    return text, denoiser


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--work", type=Path, required=True)
    reader.add_argument("--out", type=Path, required=True)
    reader.add_argument("--before", type=Path, help="a folder that an earlier run wrote: go on from its weights")
    reader.add_argument("--modules", type=Path, help="a node_modules that has the icon packages already")
    reader.add_argument("--vae-seconds", type=float, default=900)
    reader.add_argument("--denoiser-seconds", type=float, default=1500)
    reader.add_argument("--threads", type=int, default=1)
    given = reader.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    given.work.mkdir(parents=True, exist_ok=True)
    modules = given.modules or fetch_packages(given.work, ("flat", "ink", "3d"))
    flat, names = load_pictures(modules, "flat")
    ink, _ = load_pictures(modules, "ink")
    rendered = load_3d(modules)
    shares = torch.cat([torch.full((len(part),), share / len(part)) for part, share in
                        ((flat, 0.5), (rendered, 0.3), (ink, 0.2))])  # fmt: skip
    vae = train_vae(torch.cat([flat, rendered, ink]), shares, given.vae_seconds, given.before)
    vae.save_pretrained(given.work / "vae")
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in flat.split(64)])
    latents = latents * vae.config["scaling_factor"]
    tokenizer = train_tokenizer(names, given.work / "tokenizer")
    text, denoiser = train_denoiser(latents, names, tokenizer, given.denoiser_seconds, given.before)
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    pipeline = PixArtSigmaPipeline(tokenizer, text, vae, denoiser, scheduler).to(dtype=torch.bfloat16)
    pipeline.save_pretrained(given.out)
    for config in given.out.glob("*/config.json"):
        # diffusers writes where the part was loaded from: a folder of this machine.
        kept = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    print("bytes", sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file()))


if __name__ == "__main__":
    main()
