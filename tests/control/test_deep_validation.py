"""`validate?deep=true` over HTTP; what it finds is in tests/train/test_preflight.py. api.md §2.4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess
from PIL import Image

from simpletuner.cli.main import main

OPTIONS: dict[str, Any] = {
    "--model_family": "pixart_sigma",
    "--model_flavour": "nano",
    "--model_type": "full",
    "--output_dir": "out",
    "--data_backend_config": "data.json",
    "--max_train_steps": 10,
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcess]:
    (tmp_path / "p").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"p/{number}.png")
    entry = '{"id": "p", "instance_data_dir": "p", "resolution": 64, "caption_strategy": "filename"}'
    (tmp_path / "data.json").write_text(f"[{entry}]")
    running = InProcess(tmp_path)
    yield running
    running.close()


def validate(server: InProcess, query: str = "deep=true", **options: Any) -> Any:
    return server.ask(
        "POST", f"/api/training/validate?{query}", json=OPTIONS | options, headers={"Accept": "application/json"}
    )


def test_a_deep_validation_predicts_memory_and_disk(server: InProcess) -> None:
    answer = validate(server, "fit_budget_gb=100").json()
    assert (answer["valid"], answer["errors"]) == (True, [])
    assert 0 < answer["memory_plan"]["predicted_bytes"] < answer["memory_plan"]["limit_bytes"]
    assert answer["memory_plan"]["message"].startswith("Predicted memory peaks: text ")
    assert answer["disk_plan"]["free_bytes"] > answer["disk_plan"]["checkpoint_bytes"] > 0
    assert answer["fit"]["fits"] and answer["fit"]["budget_bytes"] == 100e9
    assert answer["fit"]["settings"] == {"--gradient_checkpointing": False}, "there is room, and nobody wrote it"


@pytest.mark.long
def test_the_command_line_looks_as_deep(
    server: InProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    created = server.ask("POST", "/api/configs", json={"name": "demo", "config": OPTIONS})
    assert created.status_code == 201, created.text
    monkeypatch.chdir(server.settings.workspace)
    assert main(["configs", "validate", "demo", "--fit-budget-gb", "100"]) == 0
    said = capsys.readouterr().out
    assert "demo is valid" in said and "Predicted on disk: " in said and "100.00 GB" in said


def test_a_mistake_is_told_without_looking_deeper(server: InProcess) -> None:
    mistake: dict[str, Any] = {"--learning_rat": 1}
    answer = validate(server, **mistake).json()
    assert answer["code"] == "invalid_config" and answer["memory_plan"] is None


def test_a_budget_is_a_number_above_nothing(server: InProcess) -> None:
    answer = validate(server, "fit_budget_gb=0")
    assert answer.status_code == 422 and answer.json()["code"] == "invalid_field"
