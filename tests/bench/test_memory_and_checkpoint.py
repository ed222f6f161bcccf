"""What is measured is what it says; nothing here judges a time or a size of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.bench import checkpoint, memory, numerics
from simpletuner.bench.memory import BytesFound
from simpletuner.bench.scene import Scene

pytestmark = pytest.mark.slow


def test_all_twelve_configurations_are_different_runs(tmp_path: Path) -> None:
    scene = Scene(tmp_path, 8)
    memory.write_datasets(scene)
    frozen = [scene.config(**options).model_dump_json() for options in memory.CONFIGURATIONS.values()]
    assert len(set(frozen)) == 12


@pytest.mark.parametrize(("ratios", "value", "is_met"), [((1.0, 0.95), 0.95, True), ((1.0, 1.2, 0.9), 1.2, False)])
def test_the_configuration_furthest_off_is_told(ratios: tuple[float, ...], value: float, is_met: bool) -> None:
    found = {f"number {place}": BytesFound(int(1e6 * ratio), 1_000_000) for place, ratio in enumerate(ratios)}
    figure = memory.figure("x", found, 0.85, 1.10)
    assert (figure.value, figure.is_met) == (value, is_met)
    assert "number 1" in figure.note


def test_the_plain_write_has_every_tensor_of_the_checkpoint(tmp_path: Path) -> None:
    whole, plain = tmp_path / "checkpoint", tmp_path / "plain"
    for folder in (whole / "a", whole / "b", plain):
        folder.mkdir(parents=True)
    for place, name in enumerate(("a/w", "b/w", "w")):
        save_file({"x": torch.full((1000,), float(place))}, whole / f"{name}.safetensors")
    checkpoint.write_plain(checkpoint.tensors_of(whole), plain)
    assert sum(path.stat().st_size for path in plain.iterdir()) == sum(
        path.stat().st_size for path in whole.rglob("*.safetensors")
    )
    assert len(checkpoint.tensors_of(plain)) == 3


def test_curves_are_compared_where_they_are_furthest_apart() -> None:
    plain = [2.0] * 100
    same, apart = plain.copy(), [*plain[:50], *[2.1] * 10, *plain[60:]]
    comparison = numerics.Comparison("x", {}, {}, 0.02)
    equal = numerics.figure(comparison, plain, same)
    assert equal.value == 1 and equal.is_met
    found = numerics.figure(comparison, plain, apart)
    assert found.value == pytest.approx(1.05) and found.is_met is False
