"""What `validate?deep=true` finds out, by the process that looks. training.md §9, §10.4."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_world import TinyWorld

from simpletuner.config.resolve import freeze
from simpletuner.train.preflight import main


def look(world: TinyWorld, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    config, _, datasets = freeze(world.resolve(**options))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"config": config, "datasets": datasets})))
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
