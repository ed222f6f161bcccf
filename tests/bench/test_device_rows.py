"""The rows of a GPU run end to end on a CPU with nano models; what they count is the contract's. training.md §10.3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from simpletuner.bench import __main__ as command
from simpletuner.bench import ablate, ceiling, compiling, step
from simpletuner.bench.device import choose
from simpletuner.bench.figure import Figure, Measured, OtherDevice, as_markdown, circumstances, compare
from simpletuner.bench.scene import Scene
from simpletuner.bench.work import FULL_JOBS, NANO_JOBS, Job, Works

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
PIXART, _, FLUX = NANO_JOBS


@pytest.fixture(autouse=True)
def process_as_found() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "scene", 8)


def by_end(found: Measured, end: str) -> list[Figure]:
    return [figure for figure in found.figures if figure.name.endswith(end)]


def check_flops(scene: Scene, job: Job) -> None:
    assert job.model_tflop is not None
    assert Works(scene).flops(job) / 1e12 == pytest.approx(job.model_tflop, rel=0.01)


def test_flops_of_pixart_are_those_of_the_contract(scene: Scene) -> None:
    check_flops(scene, FULL_JOBS[0])


@pytest.mark.long
@pytest.mark.parametrize("job", FULL_JOBS[1:], ids=lambda job: job.name)
def test_flops_of_the_others_are_those_of_the_contract(scene: Scene, job: Job) -> None:
    check_flops(scene, job)


def test_flops_grow_with_the_batch(scene: Scene) -> None:
    works = Works(scene)
    assert works.flops(NANO_JOBS[1]) == pytest.approx(2 * works.flops(PIXART), rel=1e-3)


def test_a_step_of_each_kind_of_job_is_measured(scene: Scene) -> None:
    found = step.measure(scene, 2, CPU, (PIXART, FLUX))
    assert found.details == {}
    for end in ("step", "pictures", "model speed", "peak memory"):
        assert len(by_end(found, end)) == 2 and all(figure.value > 0 for figure in by_end(found, end))
    assert "16 latent tokens" in by_end(found, "step")[0].note
    assert "32 latent tokens" in by_end(found, "step")[1].note, "the reference's are among them"
    assert "| step |" in as_markdown([found], circumstances(CPU))


@pytest.mark.long
def test_a_technique_is_compared_with_the_plain_step(scene: Scene) -> None:
    found = ablate.measure(scene, 2, CPU, (FLUX,), ablate.TECHNIQUES[:1])
    (time, peak) = found.figures
    assert time.name.endswith("recomputing, time on ÷ off") and time.value > 0
    assert peak.value < 1, "recomputing keeps less"


def test_the_ceiling_has_every_shape_of_the_linear_layers(scene: Scene, tmp_path: Path) -> None:
    products = ceiling.products_of(Works(scene), PIXART)
    assert products[(300, 128, 160)] == 1, "captions of full length go through their projection once"
    assert sum(products.values()) > 20
    found = ceiling.measure(Scene(tmp_path / "other", 8), 2, CPU, (PIXART,))
    assert len(found.figures) == 2 and all(figure.value > 0 for figure in found.figures)
    assert len(found.details[PIXART.name]) == len(products)


@pytest.mark.long
def test_blocks_compile_without_breaks_and_seldom_again(scene: Scene) -> None:
    found = compiling.measure(scene, CPU, NANO_JOBS)
    limited = [figure for figure in found.figures if figure.limit]
    assert len(limited) == 4, "two jobs, as another batch is no other kind of block"
    assert all(figure.is_met for figure in limited), limited


def test_buckets_have_about_the_area_of_the_square() -> None:
    sizes = compiling.buckets(1024)
    assert len(set(sizes)) == compiling.BUCKETS
    assert all(width % 64 == height % 64 == 0 and abs(width * height / 1024**2 - 1) < 0.05 for width, height in sizes)


def test_reports_of_two_devices_are_not_compared(tmp_path: Path) -> None:
    def measured(value: float) -> list[Measured]:
        return [Measured(benchmark="step", figures=[Figure(name="x: step", value=value, unit="ms")])]

    where = circumstances(CPU)
    before = {**where, "commit": "abc", "measured": [found.as_dict() for found in measured(8.0)]}
    before = json.loads(json.dumps(before))
    now = measured(6.0)
    compare(now, where, before)
    assert now[0].figures[0].note == "0.75 × the 8 of commit abc"
    with pytest.raises(OtherDevice, match="H100"):
        compare(measured(6.0), where | {"device": "NVIDIA H100"}, before)


def test_a_gpu_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the command sets for good: it is a process of its own
    assert choose("cpu") == CPU
    if not torch.cuda.is_available():
        assert choose("auto") == CPU
        with pytest.raises(SystemExit):
            command.main(["step", "--device", "cuda"])
        assert "no CUDA device" in capsys.readouterr().err
