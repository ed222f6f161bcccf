"""What `validate?deep=true` finds out, by the process that looks. training.md §9, §10.4."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_world import TinyWorld

from simpletuner.checkpoints import list_checkpoints
from simpletuner.config.resolve import freeze
from simpletuner.errors import ExitCode
from simpletuner.train.preflight import main


def look(
    world: TinyWorld,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    budget_bytes: int | None = None,
    **options: Any,
) -> Any:
    config, provenance, datasets = freeze(world.resolve(**options))
    request = {"config": config, "provenance": provenance, "datasets": datasets, "fit_budget_bytes": budget_bytes}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(request)))
    capsys.readouterr()
    main()
    return json.loads(capsys.readouterr().out)


def errors(found: Any) -> list[Any]:
    return [problem for problem in found["problems"] if problem["level"] == "error"]


def test_the_memory_of_each_phase(
    shared: TinyWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = look(shared, capsys, monkeypatch)
    assert errors(found) == []
    plan = found["memory_plan"]
    assert plan["phases"].keys() == {"text", "latents", "step", "validation", "save"}
    assert 0 < plan["predicted_bytes"] < plan["limit_bytes"]
    more = look(shared, capsys, monkeypatch, train_batch_size=512)["memory_plan"]
    assert more["phases"]["step"] > plan["phases"]["step"] + 100e6


def test_what_would_not_fit_has_its_cure(
    shared: TinyWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=50_000_000))
    found = look(shared, capsys, monkeypatch)
    (problem,) = errors(found)
    assert problem["code"] == "will_not_fit" and "this machine has 0.05 GB" in problem["message"]
    assert "Lower --text_encoder_batch_size" in problem["hint"]
    assert found["memory_plan"]["phases"]["text"] > found["memory_plan"]["limit_bytes"] == 50_000_000


def test_broken_data_and_a_model_that_is_not_there(
    world: TinyWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = look(world, capsys, monkeypatch, pretrained_model_name_or_path=str(world.pictures))
    assert [problem["code"] for problem in errors(found)] == ["model_part_missing"]
    assert errors(found)[0]["pointer"] == "/--pretrained_model_name_or_path"
    (world.pictures / "red_64x64.png").write_bytes(b"no picture")
    found = look(world, capsys, monkeypatch)
    assert "red_64x64.png" in str(errors(found))


FAT: dict[str, Any] = {"train_batch_size": 48, "gradient_checkpointing": False, "gradient_accumulation_steps": 2}


def test_settings_that_fit_a_budget(
    shared: TinyWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change is needed, the batch of a step stays, and what is proposed takes what was said of it."""
    monkeypatch.setattr("simpletuner.train.rehearsal.held_bytes", lambda: 0)
    asked = look(shared, capsys, monkeypatch, int(1e12), **FAT)["fit"]
    assert (asked["fits"], asked["settings"], asked["costs"]) == (True, {}, [])
    budget = asked["phases"]["step"]
    for part in (0.9, 0.45):
        found = look(shared, capsys, monkeypatch, round(budget * part), **FAT)["fit"]
        settings = {name.removeprefix("--"): value for name, value in found["settings"].items()}
        assert found["fits"]
        assert found["predicted_bytes"] <= budget * part and settings["gradient_checkpointing"]
        batch = FAT | settings
        assert batch["train_batch_size"] * batch["gradient_accumulation_steps"] == 96
        applied = look(shared, capsys, monkeypatch, int(1e12), **batch)["fit"]
        assert applied["settings"] == {} and applied["phases"] == pytest.approx(found["phases"], rel=1e-3)


def test_room_is_used_where_nobody_chose_recomputing(
    world: TinyWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least recomputing that fits; what somebody wrote stays."""
    monkeypatch.setattr("simpletuner.train.rehearsal.held_bytes", lambda: 0)
    world.entries[0] |= {"resolution": 256, "vae_batch_size": 1}
    data = {"train_batch_size": 32, "validation_disable": True, "dynamo_backend": "inductor"}
    full, some, none = (
        look(world, capsys, monkeypatch, int(1e12), **data, **options)["fit"]["predicted_bytes"]
        for options in (
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_keeps": "attention"},
            {"gradient_checkpointing": False},
        )
    )
    assert full < some < none
    for budget, wanted in (
        (none, {"--gradient_checkpointing": False}),
        (some, {"--gradient_checkpointing_keeps": "attention"}),
        (full, {}),
    ):
        found = look(world, capsys, monkeypatch, budget, **data)["fit"]
        assert (found["fits"], found["settings"]) == (True, wanted)
        written = look(world, capsys, monkeypatch, budget, **data, gradient_checkpointing=True)["fit"]
        assert written["settings"] == {}


def test_a_budget_that_nothing_fits_says_so(
    shared: TinyWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = look(shared, capsys, monkeypatch, 1000, model_type="lora", use_ema=True)["fit"]
    assert not found["fits"] and found["settings"]["--base_model_precision"] == "int8-quanto"
    assert found["settings"]["--vae_batch_size"] == found["settings"]["--text_encoder_batch_size"] == 1
    assert "Nothing that we know to change fits into 0.00 GB" in found["message"]


def test_the_disk_that_a_run_takes(
    world: TinyWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_train_steps": 4, "checkpoint_step_interval": 2, "use_ema": True, "validation_disable": True}
    found = look(world, capsys, monkeypatch, **options)
    plan = found["disk_plan"]
    assert world.run(**options).code == ExitCode.DONE
    checkpoints = list_checkpoints(world.root / "out")
    assert plan["num_checkpoints"] == len(checkpoints) == 2
    small_files = 100_000
    assert plan["checkpoint_bytes"] == pytest.approx(checkpoints[0].size_bytes, rel=0.02, abs=small_files)
    (cache,) = {Path(entry["cache_dir_vae"]) for entry in world.resolve().datasets if entry["dataset_type"] == "image"}
    cached = sum(file.stat().st_size for file in cache.glob("*.safetensors"))
    assert plan["latents_bytes"] == pytest.approx(cached, abs=4096)
    nearly_full = SimpleNamespace(free=plan["checkpoint_bytes"])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: nearly_full)  # pyright: ignore[reportUnknownLambdaType]
    (warning,) = [
        one for one in look(world, capsys, monkeypatch, **options)["problems"] if one["code"] == "disk_too_small"
    ]
    assert warning["pointer"] == "/--checkpoints_total_limit"
