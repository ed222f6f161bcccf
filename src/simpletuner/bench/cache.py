"""How much of the autoencoder's speed is left when pictures are read, decoded, encoded and stored."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.bench.figure import Figure, Measured, lower_bound
from simpletuner.bench.scene import Scene
from simpletuner.data.cache import CacheStore
from simpletuner.data.manifest import discover
from simpletuner.data.prepare import encode_latents
from simpletuner.families.base import PictureEncoder, build_family
from simpletuner.families.registry import load_spec

REPEATS = 5
MIN_RATIO = 0.8
"""training.md §10.2."""


class _Recorder:
    """The encoder; keeps what it was given, so that the same batches can be given again without the rest."""

    def __init__(self, encoder: PictureEncoder) -> None:
        self.fingerprint = encoder.fingerprint
        self.batches: list[tuple[Tensor, Sequence[str]]] = []
        self._encoder = encoder

    def encode(self, pixels_BCHW: Tensor, keys: Sequence[str], *, sample: bool) -> list[Tensor]:
        self.batches.append((pixels_BCHW, keys))
        return self._encoder.encode(pixels_BCHW, keys, sample=sample)


def measure(scene: Scene, repeats: int = REPEATS) -> Measured:
    """Pairs of a whole cache that is made anew and of the encoder alone on the very same batches."""
    config = scene.config()
    (entry,) = config.image_datasets
    encoder = build_family(config, load_spec(config.model.model_family)).load_picture_encoder(torch.device("cpu"))
    manifest = discover(entry, alignment=config.data.aspect_bucket_alignment, cache_dir=scene.root / "bench-scan")
    recorder = _Recorder(encoder)
    encode_latents(manifest, CacheStore(scene.root / "bench-cache-warm"), recorder)
    whole_s: list[float] = []
    alone_s: list[float] = []
    for number in range(repeats):
        store = CacheStore(Path(scene.root / f"bench-cache-{number}"))
        started_at = time.perf_counter()
        prepared = encode_latents(manifest, store, encoder)
        whole_s.append(time.perf_counter() - started_at)
        assert prepared.encoded == scene.num_pictures
        started_at = time.perf_counter()
        for pixels, keys in recorder.batches:
            encoder.encode(pixels, keys, sample=True)
        alone_s.append(time.perf_counter() - started_at)
    return Measured(benchmark="cache", figures=_figures(whole_s, alone_s, scene.num_pictures))


def _figures(whole_s: list[float], alone_s: list[float], count: int) -> list[Figure]:
    ratios = [alone / whole for whole, alone in zip(whole_s, alone_s, strict=True)]
    upper = 1 / lower_bound([1 / ratio for ratio in ratios])
    ratio = statistics.median(alone_s) / statistics.median(whole_s)
    return [
        Figure(
            name="caching ÷ encoder alone, pictures per s",
            value=ratio,
            unit="",
            least=min(ratios),
            most=max(ratios),
            limit=f"≥ {MIN_RATIO}",
            is_met=False if upper < MIN_RATIO else True if ratio >= MIN_RATIO else None,
            note=f"{count} pictures, {len(ratios)} pairs; 95 % upper bound {upper:.4f}",
        ),
        *(
            Figure(
                name=name,
                value=count / statistics.median(times),
                unit="pictures/s",
                least=count / max(times),
                most=count / min(times),
            )
            for name, times in (("caching", whole_s), ("encoder alone", alone_s))
        ),
    ]
