"""Filling the caches: what is encoded, what is reused, what happens to broken pictures. training.md §3.8, §9."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_encoders import LetterEncoder, PoolEncoder
from data_pictures import manifest_of, paint
from torch import Tensor

from simpletuner.data.cache import CacheStore, Entry
from simpletuner.data.manifest import Manifest
from simpletuner.data.media import decode_picture
from simpletuner.data.prepare import LATENTS, encode_latents, encode_texts, latent_key, text_key
from simpletuner.errors import UserError


class Count:
    """Watches a stage; asks it to stop after so many reports."""

    def __init__(self, stop_after: int = 1_000_000) -> None:
        self.reports: list[tuple[int, int]] = []
        self.stop_after = stop_after

    def report(self, current: int, total: int) -> None:
        self.reports.append((current, total))

    def should_stop(self) -> bool:
        return len(self.reports) >= self.stop_after


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(6):
        paint(tmp_path / "in" / f"wide{number}.png", 96, 64)
        paint(tmp_path / "in" / f"tall{number}.jpg", 64, 96, quality=95)
    return tmp_path / "in"


def encoded(manifest: Manifest, cache: Path, encoder: PoolEncoder | None = None) -> int:
    return encode_latents(manifest, CacheStore(cache), encoder or PoolEncoder()).encoded


def expected_latent(manifest: Manifest, row: int) -> Tensor:
    content = (Path(manifest.dataset.instance_data_dir) / manifest.paths[row]).read_bytes()
    pixels = torch.tensor(decode_picture(content, manifest.plan(row))).permute(2, 0, 1)[None]
    return PoolEncoder().encode(pixels, [latent_key(manifest, row, PoolEncoder().fingerprint)], sample=True)[0]


def check_latents(manifest: Manifest, cache: Path) -> None:
    store, fingerprint = CacheStore(cache), PoolEncoder().fingerprint
    for row in manifest.kept.tolist():
        (entry,) = store.get([latent_key(manifest, row, fingerprint)])
        torch.testing.assert_close(entry[LATENTS], expected_latent(manifest, row))


def test_batches_are_of_one_shape_and_all_latents_are_right(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root, crop=False)
    encoder, watch = PoolEncoder(), Count()
    prepared = encode_latents(manifest, CacheStore(tmp_path / "c"), encoder, watch=watch, write_batch_size=3)
    assert (prepared.encoded, prepared.reused, prepared.dropped) == (12, 0, {})
    assert sorted(shape[0] for shape in encoder.batches) == [2, 2, 4, 4]
    assert [current for current, _ in watch.reports] == sorted(current for current, _ in watch.reports)
    assert watch.reports[-1] == (12, 12)
    check_latents(manifest, tmp_path / "c")


def test_reuse(root: Path, tmp_path: Path) -> None:
    """The reuse row of §3.8, for latents."""
    cache = tmp_path / "c"
    assert encoded(manifest_of(root), cache) == 12
    assert encoded(manifest_of(root), cache) == 0
    assert encoded(manifest_of(root, id="renamed", caption_strategy="instanceprompt", instance_prompt="x"), cache) == 0
    moved = root.rename(tmp_path / "moved")
    assert encoded(manifest_of(moved), cache) == 0
    paint(moved / "wide0.png", 97, 65)
    assert encoded(manifest_of(moved), cache) == 1
    assert encoded(manifest_of(moved, crop=False), cache) == 12
    assert encoded(manifest_of(moved, resolution=128), cache) == 12
    assert encoded(manifest_of(moved), cache, PoolEncoder("another VAE")) == 12
    assert encoded(manifest_of(moved), cache, PoolEncoder(dtype=torch.bfloat16)) == 12
    # Crops move with their names: only a centre crop is the same under any.
    (moved / "wide1.png").rename(moved / "other.png")
    assert encoded(manifest_of(moved), cache) <= 1


def test_same_stem_never_collides(tmp_path: Path) -> None:
    paint(tmp_path / "in" / "a.png")
    paint(tmp_path / "in" / "a.jpg")
    manifest = manifest_of(tmp_path / "in", crop_style="center")
    assert encoded(manifest, tmp_path / "c") == 2
    check_latents(manifest, tmp_path / "c")


def test_text_reuse(tmp_path: Path) -> None:
    captions = [f"a picture of {number}" for number in range(1000)]
    encoder, store = LetterEncoder(), CacheStore(tmp_path)
    assert encode_texts([*captions, "", *captions], store, encoder).encoded == 1001
    assert encode_texts(captions, CacheStore(tmp_path), encoder).encoded == 0
    captions[500] += "!"
    prepared = encode_texts(captions, CacheStore(tmp_path), encoder)
    assert (prepared.encoded, prepared.reused, encoder.seen[-1]) == (1, 999, "a picture of 500!")
    assert encode_texts(captions, CacheStore(tmp_path), LetterEncoder("longer")).encoded == 1000
    (entry,) = store.get([text_key("", encoder.fingerprint)])
    assert entry["prompt_embeds"].shape == (1, 8)


def test_captions_of_like_length_share_a_batch(tmp_path: Path) -> None:
    batches: list[set[int]] = []

    class Recording(LetterEncoder):
        def encode(self, captions: Sequence[str]) -> list[Entry]:
            batches.append({len(caption) for caption in captions})
            return super().encode(captions)

    captions = [chr(97 + letter) * length for letter in range(8) for length in (3, 30, 300)]
    encode_texts(captions, CacheStore(tmp_path), Recording(), batch_size=8)
    assert batches == [{3}, {30}, {300}]


def test_one_broken_picture_in_200(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for number in range(200):
        paint(root / f"{number:03}.jpg", 24, 24)
    whole = (root / "077.jpg").read_bytes()
    (root / "077.jpg").write_bytes(whole[:-60])
    manifest = manifest_of(root, resolution=16)
    assert len(manifest.kept) == 200
    prepared = encode_latents(manifest, CacheStore(tmp_path / "c"), PoolEncoder())
    assert prepared.encoded == 199
    assert list(prepared.dropped) == [77] and "077.jpg" in prepared.dropped[77]
    left = manifest.without(prepared.dropped)
    assert len(left.kept) == 199
    check_latents(left, tmp_path / "c")
    assert encoded(left, tmp_path / "c") == 0


def test_many_broken_pictures_stop_the_run_but_lose_nothing(root: Path, tmp_path: Path) -> None:
    whole = (root / "wide5.png").read_bytes()
    (root / "wide5.png").write_bytes(whole[: len(whole) // 2])
    manifest = manifest_of(root)
    with pytest.raises(UserError) as caught:
        encode_latents(manifest, CacheStore(tmp_path / "c"), PoolEncoder())
    assert (caught.value.code, caught.value.exit_code) == ("data_defects", 65)
    assert "wide5.png" in caught.value.message
    assert len(CacheStore(tmp_path / "c")) >= 8


def test_a_picture_changed_since_the_scan_gets_no_latent(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root)
    paint(root / "other.png", 96, 64).rename(root / "wide3.png")
    with pytest.raises(UserError, match="changed after it was scanned"):
        encode_latents(manifest, CacheStore(tmp_path / "c"), PoolEncoder())


def test_stop_keeps_what_was_encoded(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root)
    prepared = encode_latents(manifest, CacheStore(tmp_path / "c"), PoolEncoder(), watch=Count(stop_after=2))
    assert prepared.is_stopped and prepared.encoded == 8
    assert encode_latents(manifest, CacheStore(tmp_path / "c"), PoolEncoder()).reused == 8
    texts = encode_texts([str(n) for n in range(40)], CacheStore(tmp_path / "t"), LetterEncoder(), watch=Count(1))
    assert texts.is_stopped and texts.encoded == 16 == len(CacheStore(tmp_path / "t"))


def test_an_encoder_that_fails_loses_nothing_and_leaves_no_thread(root: Path, tmp_path: Path) -> None:
    class Failing(PoolEncoder):
        def encode(self, pixels_BCHW: Tensor, keys: Sequence[str], *, sample: bool) -> list[Tensor]:
            if len(self.batches) == 2:
                raise MemoryError("third batch")
            return super().encode(pixels_BCHW, keys, sample=sample)

    before = threading.active_count()
    with pytest.raises(MemoryError):
        encode_latents(manifest_of(root), CacheStore(tmp_path / "c"), Failing())
    assert threading.active_count() == before
    assert len(CacheStore(tmp_path / "c")) == 8


def test_ranks_share_the_work(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root)
    store = CacheStore(tmp_path / "c")
    keys = [latent_key(manifest, row, PoolEncoder().fingerprint) for row in manifest.kept.tolist()]
    assert store.missing(keys) == keys
    # Both ask before either writes, as ranks do that start together.
    encoders = [PoolEncoder(), PoolEncoder()]
    for rank, encoder in enumerate(encoders):
        encode_latents(manifest, CacheStore(tmp_path / f"c{rank}"), encoder, rank=rank, world_size=2)
    assert sorted(encoders[0].seen + encoders[1].seen) == sorted(keys)


def test_corrupt_entry_is_made_anew(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root)
    encoded(manifest, tmp_path / "c")
    (shard,) = (tmp_path / "c").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-5] ^= 0xFF
    shard.write_bytes(content)
    prepared = encode_latents(manifest, CacheStore(tmp_path / "c"), PoolEncoder())
    assert (prepared.encoded, prepared.reused, len(prepared.rebuilt)) == (1, 11, 1)
    check_latents(manifest, tmp_path / "c")


def test_readers_stay_a_bounded_way_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.data.prepare.os.cpu_count", lambda: 1)
    for number in range(40):
        paint(tmp_path / "in" / f"{number}.png", 16, 16)
    manifest = manifest_of(tmp_path / "in", resolution=16)
    decoded: list[int] = []
    monkeypatch.setattr(
        "simpletuner.data.prepare.decode_picture",
        lambda content, plan: (decoded.append(1), decode_picture(content, plan))[1],  # pyright: ignore
    )
    ahead: list[int] = []

    class Slow(PoolEncoder):
        def encode(self, pixels_BCHW: Tensor, keys: Sequence[str], *, sample: bool) -> list[Tensor]:
            time.sleep(0.005)
            ahead.append(len(decoded) - len(self.seen))
            return super().encode(pixels_BCHW, keys, sample=sample)

    encode_latents(manifest, CacheStore(tmp_path / "c"), Slow())
    assert max(ahead) <= 4 + 4 + 1


FILL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from data_encoders import PoolEncoder
from data_pictures import manifest_of
from simpletuner.data.cache import CacheStore
from simpletuner.data.prepare import encode_latents
manifest = manifest_of(Path(sys.argv[1]))
sys.stdin.readline()
print(encode_latents(manifest, CacheStore(Path(sys.argv[2])), PoolEncoder(), write_batch_size=2).encoded)
"""


def test_two_processes_prepare_one_cache(root: Path, tmp_path: Path) -> None:
    arguments: list[Any] = [sys.executable, "-c", FILL, root, tmp_path / "c", Path(__file__).parent]
    children = [subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        child.communicate("\n", timeout=60)
        assert child.returncode == 0
    manifest = manifest_of(root)
    assert encoded(manifest, tmp_path / "c") == 0
    check_latents(manifest, tmp_path / "c")
