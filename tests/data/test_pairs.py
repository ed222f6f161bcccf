"""Paired pictures: who belongs to whom, cut how, read how. training.md §3.6, acceptance 11 and 15."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_encoders import LetterEncoder, PoolEncoder
from data_pictures import paint
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from simpletuner.config.dataset_options import ConditioningDataset, ImageDataset
from simpletuner.config.pairing import pair_files
from simpletuner.config.training_options import LossOptions
from simpletuner.data.cache import CacheStore
from simpletuner.data.geometry import ResizePlan, bucket_name
from simpletuner.data.keys import below, u
from simpletuner.data.ledger import check_defects, ledger_row
from simpletuner.data.loader import Batch, BatchReader, LatentSource, Loader, TextSource
from simpletuner.data.manifest import Manifest, discover
from simpletuner.data.masks import MaskEncoder
from simpletuner.data.media import decode_picture
from simpletuner.data.pairs import pair_all, strict_plan
from simpletuner.data.plan import EpochPlan
from simpletuner.data.prepare import encode_latents, encode_texts
from simpletuner.diffusion.loss import Loss
from simpletuner.diffusion.objective import Noised
from simpletuner.errors import UserError

SEED = 5


def paint_coordinates(path: Path, width: int, height: int) -> None:
    """Red says x, green says y, as fractions of the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.broadcast_to((np.arange(width) + 0.5) / width * 255, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height * 255)[:, None], (height, width))
    Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)).save(path)


def found(root: Path, conditioning: dict[str, dict[str, Any]], **keys: Any) -> list[Manifest]:
    """The dataset `in` paired with the folders named, then those sets."""
    defaults: dict[str, Any] = {"resolution": 64, "crop": True, "caption_dropout_probability": 0.5}
    entries: list[Any] = [
        ImageDataset(
            id="in",
            instance_data_dir=str(root / "in"),
            cache_dir_vae=str(root / "vae"),
            conditioning_data=list(conditioning),
            **defaults | keys,
        )
    ]
    for name, more in conditioning.items():
        own: dict[str, Any] = {"resolution": 64, "cache_dir_vae": str(root / f"vae-{name}")} | more
        entries.append(ConditioningDataset(id=name, instance_data_dir=str(root / name), **own))
    return pair_all([discover(entry, alignment=8, cache_dir=Path(entry.cache_dir_vae)) for entry in entries])


def stop(manifests: list[Manifest], **keys: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        check_defects(manifests[:1], **keys)
    assert caught.value.exit_code == 65
    return caught.value


def test_strict_pairs_show_the_same_part(tmp_path: Path) -> None:
    """Acceptance 11: equal boxes in target, reference and mask, and the pixels say the same coordinates."""
    for number, size in enumerate([(200, 120), (120, 200), (301, 150), (90, 64)]):
        paint_coordinates(tmp_path / f"in/{number}.png", *size)
        paint_coordinates(tmp_path / f"ref/{number}.bmp", *size)
        paint_coordinates(tmp_path / f"half/{number}.png", size[0] * 2, size[1] * 2)
        paint_coordinates(tmp_path / f"mask/{number}.png", *size)
    sets = {
        "ref": {"conditioning_type": "reference_strict"},
        "half": {"conditioning_type": "reference_strict"},
        "mask": {"conditioning_type": "mask"},
    }
    target, *_ = found(tmp_path, sets)
    assert len(target.kept) == 4
    assert len({target.plan(row).box for row in range(4)}) > 1
    for row in range(4):
        plans = [part.plan(row) for part in (target, *target.mates)]
        assert len({(plan.resized, plan.box, plan.target) for plan in plans}) == 1
        pixels = [
            decode_picture(part.backend.read(part.paths[row]), part.plan(row)).astype(int)
            for part in (target, *target.mates)
        ]
        assert all(np.abs(pixels[0] - other).max() <= 2 for other in pixels[1:])


@given(st.integers(64, 4000), st.integers(64, 4000), st.integers(64, 4000), st.integers(64, 4000))
def test_a_strict_plan_is_the_targets_or_none(width: int, height: int, other_w: int, other_h: int) -> None:
    own = ResizePlan((width, height), (width, height), (0, 0, 64, 64), (64, 64), 1.0)
    plan = strict_plan(own, (other_w, other_h))
    ratio = (width / height) / (other_w / other_h)
    if max(ratio, 1 / ratio) > 1.0100001:
        assert plan is None
    elif max(ratio, 1 / ratio) < 1.0099999:
        assert plan is not None and plan.source == (other_w, other_h)
        assert (plan.resized, plan.box, plan.target) == (own.resized, own.box, own.target)


def test_defects_of_pairs_stop_the_run(tmp_path: Path) -> None:
    for name in ("lost", "two", "wide", "torn", "good"):
        paint(tmp_path / f"in/{name}.webp")
    for name in ("two.png", "two.jpg", "good.png", "spare.png"):
        paint(tmp_path / "ref" / name)
    paint(tmp_path / "ref/wide.png", 96, 60)
    (tmp_path / "ref/torn.png").write_bytes(b"no picture")
    sets = {"ref": {"conditioning_type": "reference_strict"}}
    manifests = found(tmp_path, sets)
    rows = {row["path"]: row for row in (ledger_row(manifests[0], row) for row in range(5))}
    assert {path: row["reason"] for path, row in rows.items()} == {
        "good.webp": None,
        "lost.webp": "pair_missing",
        "torn.webp": "unreadable",
        "two.webp": "pair_ambiguous",
        "wide.webp": "pair_aspect",
    }
    assert rows["good.webp"]["pairs"] == [{"dataset": "ref", "path": "good.png"}]
    assert "'ref'" in rows["lost.webp"]["detail"]
    own = {row["path"]: row["reason"] for row in (ledger_row(manifests[1], n) for n in range(len(manifests[1])))}
    assert own["spare.png"] == "unpaired" and own["good.png"] is None
    error = stop(manifests)
    assert error.code == "data_defects"
    assert "reference_loose" in " ".join(problem.hint for problem in error.problems if problem.code == "pair_aspect")
    left = [problem for problem in stop(manifests, ignore_missing_files=True).problems if problem.level == "error"]
    assert {problem.code for problem in left} == {"pair_ambiguous", "pair_aspect"}


def test_missing_pairs_have_a_code_of_their_own(tmp_path: Path) -> None:
    for number in range(30):
        paint(tmp_path / f"in/{number:02}.png")
    paint(tmp_path / "ref/00.png")
    manifests = found(tmp_path, {"ref": {}})
    error = stop(manifests)
    assert error.code == "pair_missing"
    assert len([problem for problem in error.problems if problem.level == "error"]) == 20
    assert [problem.code for problem in check_defects(manifests[:1], ignore_missing_files=True)] == ["pair_missing"]
    assert len(manifests[0].kept) == 1


names = st.sets(st.tuples(st.sampled_from("abc"), st.sampled_from([".png", ".jpg", ".webp"])), max_size=9)


@given(names, names)
def test_each_file_is_paired_missing_or_ambiguous(left: set[tuple[str, str]], right: set[tuple[str, str]]) -> None:
    targets, candidates = (sorted(map("".join, side)) for side in (left, right))
    pairing = pair_files(targets, candidates)
    assert sorted([*pairing.mates, *pairing.missing, *pairing.ambiguous]) == targets
    for path, mate in pairing.mates.items():
        near = [name for name in candidates if name[0] == path[0]]
        assert mate == path or near == [mate]


class Cached:
    """A dataset with its mates, everything encoded."""

    def __init__(self, root: Path, sets: dict[str, dict[str, Any]], **keys: Any) -> None:
        self.manifest, *_ = found(root, sets, **keys)
        self.store, self.texts = CacheStore(root / "latents"), CacheStore(root / "texts")
        self.encoded = 0
        encode_texts([*self.manifest.effective_captions(), ""], self.texts, LetterEncoder())
        sources: list[LatentSource] = []
        for part in (self.manifest, *self.manifest.mates):
            encoder = MaskEncoder(8, is_segmentation=False) if part.kind == "mask" else PoolEncoder()
            self.encoded += encode_latents(part, self.store, encoder).encoded
            sources.append(LatentSource(part, self.store, encoder.fingerprint))
        own, *mates = sources
        self.source = LatentSource(own.manifest, own.store, own.fingerprint, tuple(mates))

    def batches(self, number: int, size: int = 2, **keys: Any) -> list[Batch]:
        text = TextSource(self.texts, LetterEncoder().fingerprint)
        reader = BatchReader({"in": self.source}, text, seed=SEED, **keys)
        plan = EpochPlan([self.manifest.planned_set()], seed=SEED, batch_size=size)
        with Loader(plan, reader) as loader:
            return list(islice(loader, number))


def two_sets(root: Path) -> dict[str, dict[str, Any]]:
    for number in range(6):
        for folder in ("in", "a", "b", "m"):
            paint(
                root / f"{folder}/{number}.png",
                96,
                64 + 16 * (number % 2),
            )
    strict = {"conditioning_type": "reference_strict"}
    return {"a": strict, "b": strict, "m": {"conditioning_type": "mask"}}


def test_combined_and_random(tmp_path: Path) -> None:
    sets = two_sets(tmp_path)
    for number in range(6):  # the same name paints the same picture: make the sets differ
        Image.new("RGB", (96, 64 + 16 * (number % 2)), (number, 9, 9)).save(tmp_path / f"b/{number}.png")
    cached = Cached(tmp_path, sets)
    assert cached.encoded == 4 * 6
    assert Cached(tmp_path, sets).encoded == 0
    a, b = cached.source.references
    dropped = chosen_b = unmasked = 0
    both = cached.batches(40, combined=True)
    for one, batch in zip(cached.batches(40, mask_probability=0.4), both, strict=True):
        assert len(batch.references) == 2 and len(one.references) == 1
        for place, (sample, visit) in enumerate(zip(one.samples, one.visits, strict=True)):
            row = cached.manifest.paths.index(sample.removeprefix("in/"))
            assert torch.equal(batch.references[0][place], a.read([row])[0])
            assert torch.equal(batch.references[1][place], b.read([row])[0])
            which = below(2, "cond", SEED, sample, visit)
            assert torch.equal(one.references[0][place], (a, b)[which].read([row])[0])
            chosen_b += which
            assert cached.source.mask is not None and one.mask_BHW is not None and batch.mask_BHW is not None
            mask = cached.source.mask.read([row])[0][0]
            is_masked = u("mask", SEED, sample, visit) < 0.4
            assert torch.equal(one.mask_BHW[place], mask if is_masked else torch.ones_like(mask))
            assert torch.equal(batch.mask_BHW[place], mask)
            unmasked += not is_masked
            dropped += one.captions[place] == ""
    assert dropped and unmasked and 0 < chosen_b < 80
    moved = both[0].to(torch.device("meta"))
    assert moved.mask_BHW is not None and moved.mask_BHW.is_meta and all(ref.is_meta for ref in moved.references)


def test_references_are_the_mode_and_targets_a_sample(tmp_path: Path) -> None:
    paint(tmp_path / "in/1.png", 64, 64)
    paint(tmp_path / "a/1.png", 64, 64)
    cached = Cached(tmp_path, {"a": {"conditioning_type": "reference_strict"}})
    target, reference = cached.source.read([0])[0], cached.source.references[0].read([0])[0]
    assert (tmp_path / "in/1.png").read_bytes() == (tmp_path / "a/1.png").read_bytes()
    assert not torch.equal(target, reference) and (target - reference).abs().max() < 0.1


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([(96, 64), (64, 96), (64, 64)]), min_size=4, max_size=10), st.booleans())
def test_micro_batches_of_loose_references_are_uniform(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int]], combined: bool
) -> None:
    root = tmp_path_factory.mktemp("loose")
    for number, size in enumerate(sizes):
        paint(root / f"in/{number}.png", *sizes[number - 1])
        paint(root / f"a/{number}.png", *size)
        paint(root / f"b/{number}.png", *sizes[number // 2])
    cached = Cached(root, {"a": {}, "b": {}}, crop=False, repeats=1)
    assert sum(map(len, cached.manifest.buckets().values())) == len(sizes)
    assert all(len(bucket) == 6 for bucket in cached.manifest.buckets())
    for batch in cached.batches(8, size=2, combined=combined):
        assert len(batch.references) == (2 if combined else 1)
        assert all(len(reference) == 2 for reference in batch.references)


def test_buckets_are_named() -> None:
    assert bucket_name((1280, 832)) == "1.54 (1280x832)"
    assert bucket_name((1280, 832, 64, 96)) == "1.54 (1280x832) + 64x96"


@pytest.mark.parametrize(("is_segmentation", "expected"), [(False, 51 / 255 / 4), (True, 0.25)])
def test_masks_are_averaged_over_the_latents(is_segmentation: bool, expected: float) -> None:
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    pixels[0, 0, :4, :4] = 51
    pixels[0, 1:] = 255
    (mask,) = MaskEncoder(8, is_segmentation=is_segmentation).encode(pixels, ["k"], sample=False)
    assert mask.tolist() == [[[pytest.approx(expected), 0], [0, 0]]]


def test_the_mask_multiplies_the_loss() -> None:
    predicted, target = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    one = torch.ones(2)
    noised = Noised(predicted, target, one, one, one, one)
    mask = torch.rand(2, 4, 4)
    expected = ((predicted - target).square() * mask[:, None]).flatten(1).mean(1)
    assert torch.allclose(Loss(LossOptions()).per_sample(predicted, noised, mask), expected)
    assert Loss(LossOptions())(predicted, noised, torch.zeros_like(mask)) == 0


def test_pairs_are_in_the_preflight(tmp_path: Path) -> None:
    import subprocess
    import sys

    paint(tmp_path / "in/1.png")
    paint(tmp_path / "a/1.png")
    datasets = [part.dataset.model_dump(mode="json") for part in found(tmp_path, {"a": {}})]
    pointers = ["/datasets/0", "/datasets/1"]
    asked = {"datasets": datasets, "pointers": pointers, "alignment": 8, "ignore_missing_files": False}
    request = json.dumps(asked)
    ran = subprocess.run(
        [sys.executable, "-m", "simpletuner.data.preflight"], input=request, capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["pairs"] for row in rows if "path" in row] == [[{"dataset": "a", "path": "1.png"}], []]
