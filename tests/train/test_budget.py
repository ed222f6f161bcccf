"""What a start chooses so that the run stays inside `memory_budget`. training.md §10.4, ADR 0024."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from tiny_world import TinyWorld

from simpletuner.config.train_config import TrainConfig
from simpletuner.data.manifest import Manifest, discover
from simpletuner.errors import ExitCode
from simpletuner.families.registry import load_spec
from simpletuner.train.budget import apply_choice, choose
from simpletuner.train.memory import MemoryPlan
from simpletuner.train.rehearsal import Shapes, rehearse

SPEC = load_spec("pixart_sigma")
WIDE: dict[str, Any] = {"train_batch_size": 8, "gradient_checkpointing": False, "resolution": 64}


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds is another in each run of the tests."""
    for place in ("rehearsal", "budget"):
        monkeypatch.setattr(f"simpletuner.train.{place}.held_bytes", lambda: 0)


def planned(world: TinyWorld, **options: Any) -> tuple[TrainConfig, dict[str, Manifest], MemoryPlan]:
    config = world.resolve(**options).require()
    found = [
        discover(entry, alignment=64, cache_dir=world.root / "scan", pointer="") for entry in config.image_datasets
    ]
    memory = rehearse(config, SPEC, Shapes.of(found, config), torch.device("cpu"))
    return config, {manifest.dataset.id: manifest for manifest in found}, memory


def chosen(world: TinyWorld, budget_bytes: float, **options: Any) -> Mapping[str, Any]:
    config, manifests, memory = planned(world, **options)
    return choose(config, SPEC, manifests, memory, int(budget_bytes), 1).settings


def gb(count: float) -> str:
    return str(count / 1e9)


def training_peak(world: TinyWorld, **options: Any) -> int:
    phases = planned(world, **options)[2].phases
    return max(phases["step"], phases["save"])


def test_recomputing_is_chosen_told_recorded_and_changes_no_loss(
    shared: TinyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, less = (training_peak(shared, **WIDE | {"gradient_checkpointing": on}) for on in (False, True))
    assert less < whole
    budget = gb((whole + less) / 2)
    plain = shared.run(output_dir="unbudgeted", **WIDE)
    ran = shared.run(output_dir="budgeted", memory_budget=budget, checkpoint_step_interval=2, **WIDE)
    (told,) = ran.notices("memory_choice")
    assert told["severity"] == "warning" and told["data"]["choice"]["gradient_checkpointing"] is True
    assert "a third longer" in told["data"]["hint"] and "--gradient_checkpointing true" in told["message"]
    (summary,) = [event["data"] for event in ran.of_type("training.summary")]
    assert summary["memory_choice"] == told["data"]["choice"]
    assert summary["memory_predicted_bytes"] <= float(budget) * 1e9
    assert ran.losses() == plain.losses()
    # Room for all: a new run would change nothing, a resumed one keeps what it began with.
    more = {"max_train_steps": 5, "output_dir": "budgeted", **WIDE}
    resumed = shared.run(memory_budget="100", **more)
    (kept,) = resumed.notices("memory_choice")
    assert kept["data"]["choice"] == told["data"]["choice"] and "when the run began" in kept["message"]
    again = shared.main(shared.job(memory_budget="0.00001", **more | {"max_train_steps": 6}))
    assert again.code == ExitCode.OUT_OF_MEMORY and again.events[-1]["data"]["code"] == "budget_too_small"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1 << 40, available=10**9 + 1))
    without = shared.run(**more | {"max_train_steps": 6})
    assert without.notices("memory_choice_dropped")
    (short,) = without.notices("memory_short")
    assert short["data"]["free_bytes"] == 1 and "--memory_budget auto" in short["data"]["hint"]


def test_auto_is_what_is_free_and_nothing_is_recomputed_without_need(shared: TinyWorld) -> None:
    ran = shared.run(output_dir="auto-budget", memory_budget="auto", max_train_steps=1)
    (told,) = ran.notices("memory_choice")
    assert told["severity"] == "info" and told["data"]["choice"] == {"gradient_checkpointing": False}
    assert "a quarter shorter" in told["data"]["hint"] and told["data"]["budget_bytes"] > 0
    assert not ran.notices("memory_short")


def test_what_nothing_fits_is_refused_before_it_is_loaded(shared: TinyWorld) -> None:
    ran = shared.main(shared.job(output_dir="no-budget", memory_budget="0.00001"))
    last = ran.events[-1]["data"]
    assert ran.code == ExitCode.OUT_OF_MEMORY
    assert (last["code"], last["pointer"]) == ("budget_too_small", "/--memory_budget") and last["hint"]
    assert not [event for event in ran.events if event.get("stage", {}).get("key") == "init_load_base_model"]


def test_a_batch_is_split_only_where_every_step_stays(shared: TinyWorld, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_batch_size": 4, "gradient_checkpointing": True}
    alike = TinyWorld(tmp_path, shared.model, sizes=((64, 64),))
    budget = (training_peak(alike, **options) + training_peak(alike, **options | {"train_batch_size": 2})) / 2
    split = chosen(alike, budget, **options)
    assert (split["train_batch_size"], split["gradient_accumulation_steps"]) == (2, 2)
    mixed = TinyWorld(tmp_path / "mixed", shared.model, sizes=((64, 64), (256, 64)))
    assert [len(one.buckets()) for one in planned(mixed, **options)[1].values()] == [2]
    assert "train_batch_size" not in chosen(mixed, 1000, **options), "its buckets would mix within a step"


def test_only_an_adapters_base_is_rounded(shared: TinyWorld) -> None:
    adapter = chosen(shared, 1000, model_type="lora", validation_disable=False, use_ema=True)
    assert adapter["base_model_precision"] == "int8-quanto"
    assert not adapter.keys() & {"use_ema", "validation_resolution"}, "what was asked for is not taken away"
    assert "base_model_precision" not in chosen(shared, 1000)


def test_a_chosen_encoding_batch_reaches_each_dataset(shared: TinyWorld) -> None:
    config, manifests, _ = planned(shared)
    changed = apply_choice(config, chosen(shared, 1000), SPEC)
    assert changed.text_embeds.text_encoder_batch_size == 1
    entries = {entry.id: entry for entry in changed.picture_datasets}
    assert [one.with_entries(entries).dataset.vae_batch_size for one in manifests.values()] == [1]


@pytest.mark.parametrize("value", ["0", "-3", "much", "nan"])
def test_a_budget_that_is_no_size(shared: TinyWorld, value: str) -> None:
    (error,) = shared.resolve(memory_budget=value).errors
    assert (error.code, error.pointer) == ("bad_value", "/--memory_budget")


def test_a_budget_may_be_a_json_number(shared: TinyWorld) -> None:
    assert shared.resolve(memory_budget=24).require().run.memory_budget == "24"
