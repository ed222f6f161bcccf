"""Fill the caches: readers decode ahead, the caller's thread encodes, a writer stores. training.md §3.8, §10.2.

Ranks share the work by the keys of what is missing, so that they need not agree on when they look. What is stored does
not depend on who stored it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from simpletuner.data.cache import CacheStore, Entry, cache_key
from simpletuner.data.manifest import Manifest
from simpletuner.data.media import DECODING, Pixels, UnreadablePicture, decode_picture
from simpletuner.errors import ExitCode, UserError

LATENTS = "latents"
"""Name of the one tensor of an entry, and the kind of targets; `MASK` that of masks."""
MASK = "mask"

_MAX_READERS = 16
_WRITES_AHEAD = 2
_GATHERED_BYTES = 64 << 20
S = TypeVar("S")
T = TypeVar("T")


class LatentEncoder(Protocol):
    @property
    def fingerprint(self) -> str:
        """All of the encoder that decides its output: class, weights, config, dtype, scale."""
        ...

    def encode(self, pixels_BCHW: Tensor, keys: Sequence[str], *, sample: bool) -> list[Tensor]:
        """Pixels, uint8 RGB of one size → one latent CHW each: a sample of the posterior, its noise drawn from the keys
        alone, or the posterior's mode."""
        ...


class TextEncoder(Protocol):
    @property
    def fingerprint(self) -> str: ...
    def encode(self, captions: Sequence[str]) -> list[Entry]:
        """Captions → the tensors of each, without padding."""
        ...


class Watch(Protocol):
    """What the run wants to know, and may ask for, between batches."""

    def report(self, current: int, total: int) -> None: ...
    def should_stop(self) -> bool: ...


@dataclass
class Prepared:
    """What became of one stage."""

    encoded: int = 0
    reused: int = 0
    """Distinct entries that were here already."""
    dropped: dict[int, str] = field(default_factory=dict[int, str])
    """Rows that turned out to be broken, and why: for `Manifest.without`, once the ranks have exchanged them."""
    rebuilt: list[str] = field(default_factory=list[str])
    """Keys of corrupt entries that were made anew: the notice `cache_entry_rebuilt`."""
    is_stopped: bool = False

    def merged(self, ranks: Sequence[Prepared]) -> Prepared:
        """What became of it over all `ranks`, this one among them: what another one made was not here before."""
        found = Prepared()
        for part in ranks:
            found.encoded += part.encoded
            found.dropped |= part.dropped
            found.rebuilt = sorted({*found.rebuilt, *part.rebuilt})
        found.reused = self.reused + self.encoded + len(self.dropped) - found.encoded - len(found.dropped)
        return found


def latent_key(manifest: Manifest, row: int, fingerprint: str) -> str:
    transform = f"{DECODING} {manifest.plan(row).transform}"
    return cache_key(manifest.kind, fingerprint, transform, manifest.content(row))


def text_key(caption: str, fingerprint: str) -> str:
    return cache_key("text", fingerprint, "", caption.encode("utf-8", "surrogatepass"))


def encode_latents(
    manifest: Manifest,
    store: CacheStore,
    encoder: LatentEncoder,
    *,
    watch: Watch | None = None,
    write_batch_size: int = 128,
    rank: int = 0,
    world_size: int = 1,
) -> Prepared:
    """Store a latent for every kept row that has none: of a conditioning set a reference or a mask.

    A broken picture is dropped.

    Raises UserError `data_defects` (65) when more than 1 % of the dataset's files are broken.
    """
    row_of = {latent_key(manifest, row, encoder.fingerprint): row for row in manifest.kept.tolist()}
    missing = set(_share(store.missing(list(row_of)), rank, world_size))
    prepared = Prepared(reused=len(row_of) - len(missing), rebuilt=sorted(store.corrupt & missing))
    batches = [
        batch
        for members in _by_bucket(manifest, {key: row for key, row in row_of.items() if key in missing})
        for batch in _chunks(members, manifest.dataset.vae_batch_size)
    ]
    rows = [row_of[key] for batch in batches for key in batch]
    with (
        _Writer(store, write_batch_size) as writer,
        ThreadPoolExecutor(_num_readers(), "decode") as readers,
        closing(_ahead(readers, lambda row: _decode(manifest, row), rows)) as decoded,
    ):
        for batch in batches:
            if watch and watch.should_stop():
                prepared.is_stopped = True
                break
            pixels: dict[str, Pixels] = {}
            for key in batch:
                result = next(decoded)
                if isinstance(result, UnreadablePicture):
                    prepared.dropped[row_of[key]] = str(result)
                else:
                    pixels[key] = result
            check_dropped(manifest, prepared.dropped)
            if pixels:
                stacked_BCHW = torch.as_tensor(np.stack(list(pixels.values()))).permute(0, 3, 1, 2).contiguous()
                latents = encoder.encode(stacked_BCHW, list(pixels), sample=manifest.kind == LATENTS)
                writer.add({key: {LATENTS: latent} for key, latent in zip(pixels, latents, strict=True)})
                prepared.encoded += len(pixels)
            if watch:
                watch.report(prepared.encoded + len(prepared.dropped), len(rows))
    return prepared


def encode_texts(
    captions: Sequence[str],
    store: CacheStore,
    encoder: TextEncoder,
    *,
    watch: Watch | None = None,
    batch_size: int = 16,
    write_batch_size: int = 128,
    rank: int = 0,
    world_size: int = 1,
) -> Prepared:
    """Store an entry for each distinct caption that has none; captions of like length share a batch."""
    caption_of = {text_key(caption, encoder.fingerprint): caption for caption in captions}
    missing = _share(store.missing(list(caption_of)), rank, world_size)
    prepared = Prepared(reused=len(caption_of) - len(missing), rebuilt=sorted(store.corrupt.intersection(missing)))
    ordered = sorted(missing, key=lambda key: (len(caption_of[key]), caption_of[key]))
    batches = list(_chunks(ordered, batch_size))
    total = sum(map(len, batches))
    with _Writer(store, write_batch_size) as writer:
        for batch in batches:
            if watch and watch.should_stop():
                prepared.is_stopped = True
                break
            entries = encoder.encode([caption_of[key] for key in batch])
            writer.add(dict(zip(batch, entries, strict=True)))
            prepared.encoded += len(batch)
            if watch:
                watch.report(prepared.encoded, total)
    return prepared


def _decode(manifest: Manifest, row: int) -> Pixels | UnreadablePicture:
    """The pixels of a row, of the very bytes that were hashed: never a latent under a wrong key."""
    try:
        content = manifest.backend.read(manifest.paths[row])
        if sha256(content).digest() != manifest.content(row):
            return UnreadablePicture(f"{manifest.paths[row]} was changed after it was scanned")
        return decode_picture(content, manifest.plan(row))
    except (OSError, UnreadablePicture) as error:
        return UnreadablePicture(f"{manifest.paths[row]}: {error}")


def _share(keys: list[str], rank: int, world_size: int) -> list[str]:
    """What this rank has to make of it."""
    return [key for key in keys if int(key[:8], 16) % world_size == rank]


def check_dropped(manifest: Manifest, dropped: Mapping[int, str]) -> None:
    if len(dropped) * 100 <= len(manifest):
        return
    first = next(iter(dropped.values()))
    raise UserError(
        "data_defects",
        f"Dataset {manifest.dataset.id!r}: more than 1 % of its {len(manifest)} picture(s) are broken; first: {first}.",
        hint="Replace or remove the broken files.",
        exit_code=ExitCode.DATA,
    )


def _by_bucket(manifest: Manifest, row_of: Mapping[str, int]) -> list[list[str]]:
    """Keys whose pictures can be encoded together, in the order of their rows."""
    groups: dict[object, list[str]] = {}
    for key, row in row_of.items():
        groups.setdefault(manifest.target(row), []).append(key)
    return list(groups.values())


def _chunks(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]


def _num_readers() -> int:
    return min(os.cpu_count() or 1, _MAX_READERS)


def _ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Sequence[S]) -> Generator[T]:
    """The results in order, a bounded number of them in the making."""
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * _num_readers():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _Writer:
    """Stores entries on a thread of its own, a few batches behind; leaving it, also by an error, stores the rest."""

    def __init__(self, store: CacheStore, batch_size: int) -> None:
        self._store = store
        self._batch_size = batch_size
        self._pool = ThreadPoolExecutor(1, "cache-writer")
        self._gathered: dict[str, Entry] = {}
        self._gathered_bytes = 0
        self._writes: deque[Future[None]] = deque()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        with self._pool:
            self._flush()
            while self._writes:
                self._writes.popleft().result()

    def add(self, entries: Mapping[str, Entry]) -> None:
        """Raises what an earlier write raised."""
        for key, entry in entries.items():
            self._gathered[key] = {name: tensor.cpu() for name, tensor in entry.items()}
            self._gathered_bytes += sum(tensor.nbytes for tensor in entry.values())
        if len(self._gathered) >= self._batch_size or self._gathered_bytes >= _GATHERED_BYTES:
            self._flush()

    def _flush(self) -> None:
        while len(self._writes) >= _WRITES_AHEAD:
            self._writes.popleft().result()
        if self._gathered:
            self._writes.append(self._pool.submit(self._store.put, self._gathered))
            self._gathered, self._gathered_bytes = {}, 0
