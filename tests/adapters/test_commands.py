"""`simpletuner inspect` and `simpletuner export`, as a person runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from denoisers import add_lora, flux, save_flux_lora

from simpletuner.adapters.__main__ import main as adapters
from simpletuner.adapters.convert import WRITERS
from simpletuner.adapters.file import read_adapter
from simpletuner.cli.adapters import export

SRC = Path(__file__).parents[2] / "src"


def simpletuner(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "simpletuner.cli.main", *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = flux()
    add_lora(model, rank=4, alpha=2.0)
    return save_flux_lora(model, tmp_path)


def test_export_then_inspect(source: Path) -> None:
    written = simpletuner("export", source, "--to", "kohya", "--family", "flux")
    target = source.with_name("pytorch_lora_weights_kohya.safetensors")
    assert (written.returncode, written.stderr) == (0, "")
    assert written.stdout == f"{target}: 10 modules, as kohya reads them\n"
    shown = simpletuner("inspect", target)
    assert shown.returncode == 0
    assert "family:    flux\n" in shown.stdout
    assert "read by:   comfyui, kohya\n" in shown.stdout


def answer_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict]:
    code = adapters([str(word) for word in words])
    return code, json.loads(capsys.readouterr().out)


def test_what_inspect_answers(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = answer_of(capsys, "inspect", source)
    assert code == 0
    assert "lora_adapter_metadata" in answer.pop("metadata")
    assert answer.pop("bytes") == source.stat().st_size
    assert answer == {
        "file": str(source),
        "kind": "peft",
        "family": None,
        "fits": ["flux"],
        "algorithms": ["locon"],
        "rank": [4],
        "alpha": [2.0],
        "modules": 22,
        "dtype": ["float32"],
        "readers": ["diffusers"],
    }


def test_an_output_is_not_overwritten_unasked(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("out.safetensors")
    words = ("export", source, "--to", "comfyui", "--family", "flux", "--output", target)
    assert answer_of(capsys, *words)[0] == 0
    code, answer = answer_of(capsys, *words)
    assert (code, answer["problems"][0]["code"]) == (64, "already_exists")
    assert answer_of(capsys, *words, "--overwrite")[0] == 0
    before = source.read_bytes()
    itself = ("export", source, "--to", "comfyui", "--family", "flux", "--output", source, "--overwrite")
    assert answer_of(capsys, *itself)[1]["problems"][0]["code"] == "already_exists"
    assert source.read_bytes() == before
    assert read_adapter(target).family == "flux"


def test_an_unknown_family(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = answer_of(capsys, "export", source, "--to", "comfyui")
    assert (code, answer["problems"][0]["code"]) == (64, "adapter_family_unknown")
    assert "names fit: flux" in answer["problems"][0]["hint"]
    code, answer = answer_of(capsys, "export", source, "--to", "comfyui", "--family", "fluks")
    assert (code, answer["problems"][0]["code"]) == (64, "unknown_family")


def test_the_command_offers_every_writer() -> None:
    """The command's half is of the control world, and cannot import the table."""
    assert get_args(get_type_hints(export)["to"]) == tuple(WRITERS)


@pytest.mark.long
def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    ran = simpletuner("inspect", tmp_path / "absent.safetensors")
    assert ran.returncode == 65
    assert ran.stderr.startswith("adapter_unreadable: absent.safetensors cannot be read")


def test_an_output_that_cannot_be_written(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = source.parent / "absent" / "out.safetensors"
    code, answer = answer_of(capsys, "export", source, "--to", "comfyui", "--family", "flux", "--output", nowhere)
    assert (code, answer["problems"][0]["code"]) == (73, "storage")
