"""Paired data in a run: pair errors before a model loads, caches, ledgers, masks in the loss. Acceptance 15."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import torch
from tiny_world import TinyWorld

from simpletuner.families.base import build_family
from simpletuner.families.registry import load_spec
from simpletuner.train.inputs import Preparation
from simpletuner.train.rehearsal import plan_memory
from simpletuner.train.report import Reporter
from simpletuner.train.requests import RequestReader

TARGETS = {"id": "tiny", "instance_data_dir": "pictures", "resolution": 64, "conditioning_data": ["edges", "mask"]}


def paired(world: TinyWorld) -> None:
    world.entries = [TARGETS]
    for name, kind in (("edges", "reference_strict"), ("mask", "mask")):
        shutil.copytree(world.pictures, world.root / name)
        world.entries.append({"id": name, "conditioning_type": kind, "instance_data_dir": name, "resolution": 64})


def encoded(ran: Any) -> dict[str, int]:
    return {row["data"]["kind"]: row["data"]["encoded"] for row in ran.notices("cache_report")}


def test_a_paired_run(world: TinyWorld) -> None:
    plain = world.run(max_train_steps=2, output_dir="plain")
    paired(world)
    first = world.run(max_train_steps=2)
    assert first.code == 0 and encoded(first)["references"] == encoded(first)["masks"] == 24
    again = world.run(max_train_steps=2, output_dir="again")
    assert set(encoded(again).values()) == {0}
    assert first.losses() == again.losses() and first.losses()[0] < plain.losses()[0], "a mask only takes away"
    rows = [json.loads(line) for line in (first.job.artifacts / "ledger-tiny.jsonl").read_text().splitlines()]
    assert rows[0]["pairs"] == [{"dataset": name, "path": rows[0]["path"]} for name in ("edges", "mask")]
    assert (first.job.artifacts / "ledger-mask.jsonl").is_file()
    assert world.run(max_train_steps=2, output_dir="off", masked_loss_probability=0).losses() == plain.losses()


def test_a_missing_pair_ends_before_a_model_loads(world: TinyWorld) -> None:
    paired(world)
    next((world.root / "edges").iterdir()).unlink()
    ran = world.main(world.job())
    assert ran.code == 65 and ran.events[-1]["data"]["code"] == "pair_missing"
    stages = {event["stage"]["key"] for event in ran.of_type("lifecycle.stage")}
    assert not stages & {"init_text_embed_cache", "init_vae_cache", "init_load_base_model"}
    assert world.run(ignore_missing_files=True, max_train_steps=1).code == 0


def test_references_for_validation(world: TinyWorld) -> None:
    paired(world)
    world.entries[1]["conditioning_type"] = "reference_loose"
    config = world.resolve().require()
    job = world.job()
    journal = job.open_journal()
    try:
        family = build_family(config, load_spec("pixart_sigma"))
        parts = (Reporter(journal, job.artifacts), RequestReader(job), torch.device("cpu"))
        preparation = Preparation(config, family, *parts)
        manifests = preparation.discover(job.artifacts)
        memory = plan_memory(config, load_spec("pixart_sigma"), manifests, torch.device("cpu"))
        inputs = preparation.encode(manifests, [], memory)
    finally:
        journal.close()
    references = inputs.validation_references("tiny", 3)
    paths = inputs.manifests["tiny"].paths[:3]
    assert [reference.sample for reference in references] == [f"tiny/{path}" for path in paths]
    for reference in references:
        (latents,), (size,) = reference.latents, reference.sizes
        assert latents.shape == (4, size[1] // 8, size[0] // 8) and reference.target == size
    before = inputs.fingerprint()
    manifest = inputs.manifests["tiny"]
    inputs.manifests["tiny"] = replace(manifest, mates=manifest.mates[:1])
    assert inputs.fingerprint() != before
