"""Pictures that edit families validate on: samples of a dataset, or a prompt's own. training.md §4.4, §7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.config.prompt import Prompt
from simpletuner.data.cache import CacheStore, cache_key
from simpletuner.data.geometry import ResizePlan, Size
from simpletuner.data.loader import LatentSource
from simpletuner.data.media import DECODING, UnreadablePicture, decode_picture, read_size
from simpletuner.data.prepare import LATENTS, LatentEncoder
from simpletuner.errors import ExitCode, UserError


@dataclass(frozen=True, slots=True)
class Reference:
    """What a validation image of an edit family starts from."""

    sample: str
    """The dataset's sample, or the files of the prompt's own pictures."""
    latents: tuple[Tensor, ...]
    """C×H×W each; of a sample all sets, in the order of `conditioning_data`."""
    target: Size
    """(width, height) in pixels of the picture that a sample is trained to become; else of the first reference."""
    sizes: tuple[Size, ...]
    """Of the references."""
    caption: str


def sample_references(source: LatentSource, n: int) -> list[Reference]:
    """Of the first `n` kept samples. Always all conditioning sets."""
    manifest = source.manifest
    return [
        Reference(
            sample=manifest.sample(row),
            latents=tuple(mates.read([row])[0].clone() for mates in source.references),
            target=manifest.plan(row).target,
            sizes=tuple(mates.manifest.plan(row).target for mates in source.references),
            caption=manifest.captions.texts[manifest.captions.of(row)[0]],
        )
        for row in manifest.kept.tolist()[:n]
    ]


def prompt_reference(prompt: Prompt, sizes: Sequence[Size], encoder: LatentEncoder, store: CacheStore) -> Reference:
    """Each picture brought to the nearest aspect of `sizes`. Raises UserError `prompt_image_unreadable` (65)."""
    try:
        contents = [Path(image).read_bytes() for image in prompt.images]
        plans = [plan_free(read_size(BytesIO(content)), sizes) for content in contents]
        encoded = [_encode(*pair, encoder, store) for pair in zip(contents, plans, strict=True)]
    except (OSError, UnreadablePicture) as error:
        raise UserError(
            "prompt_image_unreadable",
            f"A picture of the prompt {prompt.shortname!r} cannot be read: {error}.",
            hint=", ".join(prompt.images),
            pointer="/--user_prompt_library",
            exit_code=ExitCode.DATA,
        ) from error
    targets = tuple(plan.target for plan in plans)
    return Reference(", ".join(prompt.images), tuple(encoded), targets[0], targets, prompt.text)


def plan_free(source: Size, sizes: Sequence[Size]) -> ResizePlan:
    """The whole picture at the size whose aspect is nearest; of two equally near ones the first, as diffusers does."""
    width, height = source
    target = min(sizes, key=lambda size: (abs(width / height - size[0] / size[1]), size))
    scale = max(target[0] / width, target[1] / height)
    stretch = (target[0] / target[1]) / (width / height)
    return ResizePlan(source, target, (0, 0, *target), target, scale, stretch)


def _encode(content: bytes, plan: ResizePlan, encoder: LatentEncoder, store: CacheStore) -> Tensor:
    key = cache_key("reference", encoder.fingerprint, f"{DECODING} {plan.transform}", sha256(content).digest())
    if store.missing([key]):
        pixels = torch.as_tensor(decode_picture(content, plan).copy()).permute(2, 0, 1)[None].contiguous()
        store.put({key: {LATENTS: encoder.encode(pixels, [key], sample=False)[0]}})
    return store.get([key])[0][LATENTS].clone()
