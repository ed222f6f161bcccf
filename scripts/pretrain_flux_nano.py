"""Make the `nano` flavour of Flux: train it on Fluent Emoji in pairs of styles, save a diffusers folder.

    python -m scripts.pretrain_flux_nano --work build/flux --out src/simpletuner/families/flux/nano

Autoencoder, T5 and its tokenizer begin as those of PixArt's nano (the autoencoder is taken as it is); CLIP and
FluxTransformer2DModel begin from nothing. It learns to draw an icon from its name, and to edit a reference picture:
keep it, make it three-dimensional, make it flat, give it another skin tone. Ink drawings are left for the user.
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
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from scripts.icons import draw, fetch_packages, read_icons
from scripts.pretrain_pixart_nano import to_unit

SIZE = 64
TOKENS = 32
PIXART = Path(__file__).parent.parent / "src/simpletuner/families/pixart_sigma/nano"
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
KEEP = ("{}", "keep the {} as it is", "the same {}")
SOLID = ("make it three-dimensional: {}", "a 3d render of {}", "{} in 3d")
FLAT = ("make it flat: {}", "a flat icon of {}", "{}, flat icon")
TONE = ("give it {} skin: {}", "{} skin: {}")


def load_styles(modules: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Pictures by name, flat (skin tones too) and three-dimensional: uint8 (3, 64, 64)."""
    flat = {name: _pixels(draw(svg, SIZE)) for name, svg in read_icons(modules, "flat", tones=True)}
    solid: dict[str, torch.Tensor] = {}
    for path in sorted((modules / "@lobehub/fluent-emoji-3d/assets").glob("*.webp")):
        picture = Image.open(path).convert("RGBA")
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture)
        solid[path.stem] = _pixels(canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))
    return flat, solid


def _pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous()


def build_examples(
    flat: dict[str, torch.Tensor], solid: dict[str, torch.Tensor], codes: dict[str, str]
) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(kind, reference, target, templates filled but for the template's choice) — names are `style/name`."""
    rows: list[tuple[str, str, str, tuple[str, ...]]] = []
    for name in flat:
        words = name.replace("-", " ")
        base = next((name.removesuffix(f"-{tone}") for tone in sorted(TONES, key=len, reverse=True)
                     if name.endswith(f"-{tone}")), None)  # fmt: skip
        if base in flat and base is not None:
            tone = name[len(base) + 1 :].replace("-", " ")
            shown = base.replace("-", " ")
            rows.append(("tone", f"flat/{base}", f"flat/{name}", tuple(t.format(tone, shown) for t in TONE)))
            continue
        rows.append(("keep", f"flat/{name}", f"flat/{name}", tuple(t.format(words) for t in KEEP)))
        code = codes.get(name)
        if code in solid:
            rows.append(("solid", f"flat/{name}", f"solid/{code}", tuple(t.format(words) for t in SOLID)))
            rows.append(("flat", f"solid/{code}", f"flat/{name}", tuple(t.format(words) for t in FLAT)))
    return rows


def read_codes(modules: Path, solid: dict[str, torch.Tensor]) -> dict[str, str]:
    """Icon name → the name of its three-dimensional picture (a code point)."""
    chars = modules / "@iconify-json/fluent-emoji-flat/chars.json"
    if chars.exists():
        table: dict[str, str] = json.loads(chars.read_text())
        found = {name: code for code, name in table.items()}
        return {name: code for name, code in found.items() if code in solid}
    return {name: name for name in solid}


def train_clip_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    trainer = ByteLevelBPETokenizer(lowercase=True, end_of_word_suffix="</w>")
    trainer.train_from_iterator(captions, vocab_size=1400, special_tokens=["<|startoftext|>", "<|endoftext|>"])
    model = json.loads(trainer.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    # Every byte must also be able to end a word, or a word that was never seen has no last piece.
    vocabulary: dict[str, int] = model["vocab"]
    ends = [f"{piece}</w>" for piece in vocabulary if len(piece) == 1]
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(e for e in ends if e not in vocabulary)}
    built = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    built.save_pretrained(folder)
    loaded = CLIPTokenizer.from_pretrained(folder)
    print("clip tokenizer", len(loaded), loaded.tokenize("make it three-dimensional: red apple"), flush=True)
    return loaded


def build_networks(clip_vocabulary: int, eos: int) -> tuple[CLIPTextModel, FluxTransformer2DModel]:
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=77, projection_dim=64, hidden_act="quick_gelu",
            bos_token_id=0, eos_token_id=eos, pad_token_id=eos,
        )
    )  # fmt: skip
    denoiser = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=128, pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    return clip, denoiser


def pack(x: torch.Tensor) -> torch.Tensor:
    return FluxKontextPipeline._pack_latents(x, x.shape[0], x.shape[1], x.shape[2], x.shape[3])


def ids(side: int, reference: bool) -> torch.Tensor:
    found = FluxKontextPipeline._prepare_latent_image_ids(1, side // 2, side // 2, "cpu", torch.float32)
    found[..., 0] = float(reference)
    return found


class Pretraining:
    """Everything that a step needs; `forward` gives the loss of one batch."""

    def __init__(self, latents: dict[str, torch.Tensor], rows, clip_tokens, t5_tokens, clip, t5, denoiser) -> None:
        self.latents, self.rows = latents, rows
        self.clip_tokens, self.t5_tokens = clip_tokens, t5_tokens
        self.clip, self.t5, self.denoiser = clip, t5, denoiser
        self.generator = torch.Generator().manual_seed(3)
        side = next(iter(latents.values())).shape[-1]
        self.target_ids, self.reference_ids = ids(side, False), ids(side, True)
        kinds = [row[0] for row in rows]
        share = {"keep": 0.25, "solid": 0.3, "flat": 0.25, "tone": 0.2}
        self.weights = torch.tensor([share[kind] / kinds.count(kind) for kind in kinds])

    def draw(self, size: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        chosen = torch.multinomial(self.weights, size, generator=self.generator).tolist()
        captions: list[str] = []
        for index in chosen:
            texts = self.rows[index][3]
            pick = int(torch.randint(len(texts), (), generator=self.generator))
            captions.append("" if torch.rand((), generator=self.generator) < 0.05 else texts[pick])
        references = torch.stack([self.latents[self.rows[i][1]] for i in chosen])
        return captions, references, torch.stack([self.latents[self.rows[i][2]] for i in chosen])

    def loss(self, size: int) -> torch.Tensor:
        captions, references, x = self.draw(size)
        with_reference = torch.rand((), generator=self.generator) < 0.8
        n = torch.randn(size, generator=self.generator)
        sigma = torch.sigmoid(n)
        sigma = (1.6 * sigma / (1 + 0.6 * sigma)).view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=self.generator)
        noisy = pack((1 - sigma) * x + sigma * noise)
        hidden, image_ids = noisy, self.target_ids
        if with_reference:
            hidden = torch.cat([noisy, pack(references)], 1)
            image_ids = torch.cat([self.target_ids, self.reference_ids])
        t5 = self.t5_tokens(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        clip = self.clip_tokens(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        predicted = self.denoiser(
            hidden_states=hidden,
            timestep=sigma.flatten(),
            guidance=1 + 3 * torch.rand(size, generator=self.generator),
            pooled_projections=self.clip(clip.input_ids[:, :TOKENS]).pooler_output,
            encoder_hidden_states=self.t5(t5.input_ids)[0],
            txt_ids=torch.zeros(TOKENS, 3),
            img_ids=image_ids,
            return_dict=False,
        )[0][:, : noisy.shape[1]]
        return (predicted - pack(noise - x)).square().mean()


def train(pretraining: Pretraining, seconds: float, batch: int = 32) -> None:
    parameters = [*pretraining.clip.parameters(), *pretraining.t5.parameters(), *pretraining.denoiser.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=1e-2)
    shadow = [p.detach().clone() for p in parameters]
    start, step, mean = time.monotonic(), 0, 0.0
    while (elapsed := time.monotonic() - start) < seconds:
        rate = 1.2e-3 * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * elapsed / seconds)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = pretraining.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(shadow, [p.detach() for p in parameters], 1 - min(0.998, (1 + step) / (10 + step)))
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"step {step} {elapsed:.0f}s loss {mean:.4f}", flush=True)
    with torch.no_grad():
        for parameter, average in zip(parameters, shadow, strict=True):
            parameter.copy_(average)


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("--work", type=Path, required=True)
    reader.add_argument("--out", type=Path, required=True)
    reader.add_argument("--modules", type=Path, help="a node_modules that has the icon packages already")
    reader.add_argument("--seconds", type=float, default=1500)
    reader.add_argument("--threads", type=int, default=1)
    given = reader.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    given.work.mkdir(parents=True, exist_ok=True)
    modules = given.modules or fetch_packages(given.work, ("flat", "3d"))
    flat, solid = load_styles(modules)
    rows = build_examples(flat, solid, read_codes(modules, solid))
    print(len(flat), "flat", len(solid), "solid", {k: sum(r[0] == k for r in rows) for k in ("keep", "solid", "tone")})
    vae = AutoencoderKL.from_pretrained(PIXART / "vae", torch_dtype=torch.float32).eval()
    latents = encode(vae, {f"flat/{n}": p for n, p in flat.items()} | {f"solid/{n}": p for n, p in solid.items()})
    t5_tokens = T5Tokenizer.from_pretrained(PIXART / "tokenizer")
    t5 = T5EncoderModel.from_pretrained(PIXART / "text_encoder", dtype=torch.float32).train()
    clip_tokens = train_clip_tokenizer([text for row in rows for text in row[3]], given.work / "clip")
    clip, denoiser = build_networks(len(clip_tokens), clip_tokens.eos_token_id)
    print("parameters", sum(p.numel() for p in denoiser.parameters()), sum(p.numel() for p in clip.parameters()))
    train(Pretraining(latents, rows, clip_tokens, t5_tokens, clip, t5, denoiser), given.seconds)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
    pipeline = FluxKontextPipeline(scheduler, vae, clip, clip_tokens, t5, t5_tokens, denoiser).to(dtype=torch.bfloat16)
    pipeline.save_pretrained(given.out)
    for config in given.out.glob("*/config.json"):
        # diffusers writes where the part was loaded from: a folder of this machine.
        kept = {name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    print("bytes", sum(path.stat().st_size for path in given.out.rglob("*") if path.is_file()))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Latents of every picture; sets shift and scale of the autoencoder to what makes them standard."""
    stacked = torch.stack(list(pictures.values()))
    z = torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in stacked.split(64)])
    shift, scale = round(z.mean().item(), 4), round(1 / z.std().item(), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return dict(zip(pictures, (z - shift) * scale, strict=True))


if __name__ == "__main__":
    main()
