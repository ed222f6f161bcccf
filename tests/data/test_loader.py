"""Batches: right, in order, the same however they are made; failures come out at once. training.md §3.7, §9."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from data_encoders import LetterEncoder, PoolEncoder
from data_pictures import manifest_of, paint
from PIL import ImageFile
from torch import Tensor

from simpletuner.data.cache import CacheStore, Entry
from simpletuner.data.captions import choose_caption
from simpletuner.data.loader import Batch, BatchReader, LatentSource, Loader, TextSource, collate_prompts
from simpletuner.data.plan import START, EpochPlan, Position
from simpletuner.data.prepare import LATENTS, encode_latents, encode_texts, latent_key, text_key
from simpletuner.errors import UserError

SEED = 11


class Fixture:
    """Two datasets, cached."""

    def __init__(self, tmp_path: Path) -> None:
        for number in range(5):
            paint(tmp_path / "one" / f"wide_{number}.png", 96, 64)
            paint(tmp_path / "one" / f"tall_{number}{'x' * number}.png", 64, 96)
            paint(tmp_path / "two" / f"square{number}.png", 64, 64)
        keys: dict[str, Any] = {"caption_strategy": "instanceprompt", "instance_prompt": ["p", "qq", "rrr"]}
        manifests = [
            manifest_of(tmp_path / "one", id="one", crop=False, repeats=1, caption_dropout_probability=0.3),
            manifest_of(tmp_path / "two", id="two", **keys),
        ]
        self.latents = CacheStore(tmp_path / "latents")
        self.texts = CacheStore(tmp_path / "texts")
        self.text_root = tmp_path / "texts"
        for manifest in manifests:
            encode_latents(manifest, self.latents, PoolEncoder())
            encode_texts([*manifest.effective_captions(), ""], self.texts, LetterEncoder())
        self.manifests = {manifest.dataset.id: manifest for manifest in manifests}

    def plan(self, batch_size: int = 2, world_size: int = 1) -> EpochPlan:
        sets = [manifest.planned_set() for manifest in self.manifests.values()]
        return EpochPlan(sets, seed=SEED, batch_size=batch_size, world_size=world_size)

    def reader(self, **keys: Any) -> BatchReader:
        fingerprint = PoolEncoder().fingerprint
        sources = {id: LatentSource(manifest, self.latents, fingerprint) for id, manifest in self.manifests.items()}
        return BatchReader(sources, TextSource(self.texts, LetterEncoder().fingerprint), seed=SEED, **keys)

    def batches(self, number: int, **keys: Any) -> list[Batch]:
        plan = self.plan(keys.pop("batch_size", 2), keys.get("world_size", 1))
        with Loader(plan, self.reader(), **keys) as loader:
            return list(islice(loader, number))


@pytest.fixture
def cached(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path)


def same(left: Batch, right: Batch) -> bool:
    """Equal in every field, tensors bit for bit."""
    nothing = torch.empty(0)
    told = replace(left, latents_BCHW=nothing, text={}) == replace(right, latents_BCHW=nothing, text={})
    texts = left.text.keys() == right.text.keys() and all(torch.equal(left.text[n], right.text[n]) for n in left.text)
    return told and texts and torch.equal(left.latents_BCHW, right.latents_BCHW)


def test_batches_hold_what_they_say(cached: Fixture) -> None:
    batches = cached.batches(30)
    dropped = 0
    for batch in batches:
        manifest = cached.manifests[batch.dataset_id]
        assert batch.latents_BCHW.shape[2:] == (batch.target[1] // 8, batch.target[0] // 8)
        for place, (sample, visit, caption) in enumerate(zip(batch.samples, batch.visits, batch.captions, strict=True)):
            row = manifest.paths.index(sample.removeprefix(f"{batch.dataset_id}/"))
            (entry,) = cached.latents.get([latent_key(manifest, row, PoolEncoder().fingerprint)])
            assert torch.equal(batch.latents_BCHW[place], entry[LATENTS])
            variants = [manifest.captions.texts[n] for n in manifest.captions.of(row)]
            p = manifest.dataset.caption_dropout_probability
            choice = choose_caption(len(variants), p, seed=SEED, sample=sample, visit=visit)
            assert caption == ("" if choice.is_dropped else variants[choice.variant])
            dropped += choice.is_dropped
            (text,) = cached.texts.get([text_key(caption, LetterEncoder().fingerprint)])
            length = len(text["prompt_embeds"])
            assert batch.text["prompt_mask"][place].sum() == length
            assert torch.equal(batch.text["prompt_embeds"][place, :length], text["prompt_embeds"])
            assert not batch.text["prompt_embeds"][place, length:].any()
        assert batch.text["prompt_mask"].any(0).all(), "no column of padding only"
    assert dropped
    assert {batch.dataset_id for batch in batches} == {"one", "two"}
    assert len({caption for batch in batches for caption in batch.captions if batch.dataset_id == "two"}) >= 3


def test_prefetch_changes_nothing(cached: Fixture) -> None:
    plain = cached.batches(25, prefetch=0, accumulation=3)
    for ahead in (1, 10):
        assert all(map(same, plain, cached.batches(25, prefetch=ahead, accumulation=3)))
    assert [batch.is_last_micro for batch in plain[:6]] == [False, False, True] * 2


def test_goes_on_where_it_stopped(cached: Fixture) -> None:
    whole = cached.batches(30)
    assert whole[0].position == START
    for number in (1, 12, 13, 29):
        position = whole[number - 1].next_position
        assert all(map(same, whole[number:], cached.batches(30 - number, position=position)))
    assert whole[12].position == Position(1, 0), "5 + 5 + 2 groups"


def test_two_ranks_see_what_one_sees(cached: Fixture) -> None:
    one = cached.batches(10, batch_size=4)
    ranks = [cached.batches(10, rank=rank, world_size=2) for rank in range(2)]
    for whole, left, right in zip(one, *ranks, strict=True):
        assert torch.equal(whole.latents_BCHW, torch.cat([left.latents_BCHW, right.latents_BCHW]))
        assert whole.samples == left.samples + right.samples and whole.captions == left.captions + right.captions


def test_nothing_is_decoded(cached: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a cached picture was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    cached.batches(15)


@pytest.mark.parametrize("prefetch", [0, 10])
def test_a_failing_worker_is_heard_at_once(cached: Fixture, prefetch: int) -> None:
    calls: list[int] = []
    first_taken = Event()

    def collate(entries: Any) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 4:
            first_taken.wait(10)
            raise ZeroDivisionError("in the worker")
        return collate_prompts(entries)

    with Loader(cached.plan(), cached.reader(collate_text=collate), prefetch=prefetch) as loader:
        next(loader)
        first_taken.set()
        while prefetch and len(calls) < 4:
            time.sleep(0.001)
        time.sleep(0.05)
        started = time.monotonic()
        with pytest.raises(UserError) as caught:
            list(islice(loader, 1 if prefetch else 10))
        assert time.monotonic() - started < 20
        with pytest.raises(UserError):
            next(loader)
    assert (caught.value.code, caught.value.exit_code) == ("loader_failed", 70)
    cause = caught.value.__cause__
    assert isinstance(cause, ZeroDivisionError) and cause.__traceback__ is not None


def test_a_lost_entry_is_a_fault_of_the_data(cached: Fixture) -> None:
    for file in cached.text_root.iterdir():
        file.unlink()
    cached.texts = CacheStore(cached.text_root)
    with pytest.raises(UserError) as caught:
        cached.batches(1)
    assert (caught.value.code, caught.value.exit_code) == ("loader_failed", 65)
    assert isinstance(caught.value.__cause__, UserError) and caught.value.__cause__.code == "cache_entry_missing"


def test_closing_ends_the_worker(cached: Fixture) -> None:
    before = threading.active_count()
    loader = Loader(cached.plan(), cached.reader())
    next(loader)
    loader.close()
    assert threading.active_count() == before


def test_collate_stacks_the_rest(cached: Fixture) -> None:
    entries: list[Entry] = [{"prompt_embeds": torch.ones(n, 2), "pooled": torch.full((3,), float(n))} for n in (1, 3)]
    batch = collate_prompts(entries)
    assert batch["prompt_embeds"].shape == (2, 3, 2) and batch["pooled"].tolist() == [[1.0] * 3, [3.0] * 3]
    assert batch["prompt_mask"].tolist() == [[True, False, False], [True] * 3]


def test_batch_moves(cached: Fixture) -> None:
    (batch,) = cached.batches(1)
    moved = batch.to(torch.device("meta"))
    assert moved.latents_BCHW.is_meta and moved.text["prompt_embeds"].is_meta and moved.samples == batch.samples
