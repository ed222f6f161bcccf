from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_world import TinyWorld

from simpletuner.train.sheet import Row, choose_columns, find_images, write_sheet


def draw(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(path)


def test_rows_are_prompts_and_columns_steps(tmp_path: Path) -> None:
    draw(tmp_path / "benchmarks/base_model/night_bench_0_64x64.png", "red")
    draw(tmp_path / "validation_images/step_10_night_bench_0_64x64.png", "green")
    draw(tmp_path / "validation_images/step_20_night_bench_0_64x64.png", "blue")
    draw(tmp_path / "validation_images/step_20_night_bench_0_64x64_ema.png", "yellow")
    (tmp_path / "validation_images/notes.txt").write_text("no picture")
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-best").symlink_to("checkpoint-10")
    rows = find_images(tmp_path)
    assert [(row, sorted(files)) for row, files in rows.items()] == [
        (Row("night_bench", 0, "64x64"), [0, 10, 20]),
        (Row("night_bench", 0, "64x64", "_ema"), [20]),
    ]
    path = write_sheet(tmp_path)
    assert path is not None
    sheet = Image.open(path)
    assert sheet.size == (3 * 192, 18 + 2 * (192 + 18))
    middles = [sheet.getpixel((column * 192 + 60, 18 + 18 + 60)) for column in range(3)]
    assert middles == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert sheet.getpixel((2 * 192 + 60, 18 + 210 + 18 + 60)) == (255, 255, 0)


def test_one_step_is_nothing_to_compare(tmp_path: Path) -> None:
    assert write_sheet(tmp_path) is None
    draw(tmp_path / "validation_images/step_10_a_0_64x64.png", "green")
    assert write_sheet(tmp_path) is None


@given(st.sets(st.integers(0, 1000), min_size=1, max_size=60).map(sorted), st.data())
def test_of_many_steps_some_are_shown(steps: list[int], data: st.DataObject) -> None:
    best = data.draw(st.sampled_from(steps) | st.none())
    chosen = choose_columns(steps, best)
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(steps) and len(chosen) <= 10
    assert {steps[0], steps[-1]} <= set(chosen) and (best is None or best in chosen)


def test_a_run_leaves_its_sheet(world: TinyWorld) -> None:
    ran = world.run(
        max_train_steps=2, validation_disable=False, validation_prompt="red", validation_resolution="64x64",
        validation_num_inference_steps=2, validation_step_interval=1, validation_disable_unconditional=True,
    )  # fmt: skip
    (notice,) = ran.notices("comparison_sheet")
    assert Image.open(ran.job.artifacts / notice["images"][0]["artifact_id"]).width == 3 * 192
    assert (ran.output / "comparison.png").exists()
