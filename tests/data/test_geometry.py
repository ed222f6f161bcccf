"""training.md §3.3, §3.4: the golden tables, and what must hold for every picture."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.dataset_options import ImageDataset
from simpletuner.data.geometry import DropReason, ResizePlan, bucket_name, plan_resize

PIXART: dict[str, Any] = {
    "resolution": 1.0, "resolution_type": "area", "minimum_image_size": 0.25, "maximum_image_size": 1.0,
    "target_downsample_size": 1.0, "crop": True,
}  # fmt: skip
KONTEXT: dict[str, Any] = {
    "resolution": 1024, "resolution_type": "pixel_area", "minimum_image_size": 768, "maximum_image_size": 1536,
    "target_downsample_size": 1024, "crop": True,
}  # fmt: skip


def dataset(**keys: Any) -> ImageDataset:
    return ImageDataset(id="set", instance_data_dir="/in", cache_dir_vae="/cache", **keys)


def planned(
    width: int, height: int, stem: str = "0001", alignment: int = 64, cycle: int = 0, **keys: Any
) -> ResizePlan:
    plan = plan_resize(width, height, stem=stem, dataset=dataset(**keys), alignment=alignment, cycle=cycle)
    assert isinstance(plan, ResizePlan), plan
    return plan


@pytest.mark.parametrize(
    ("source", "pixel_area", "area", "pixel"),
    [
        ((3000, 2000), (1280, 832), (832, 576), (1152, 768)),
        ((3000, 4000), (896, 1152), (640, 832), (768, 1024)),
        ((1920, 1080), (1344, 768), (960, 512), (1344, 768)),
        ((900, 900), (1024, 1024), (704, 704), (768, 768)),
    ],
)
def test_targets(
    source: tuple[int, int], pixel_area: tuple[int, int], area: tuple[int, int], pixel: tuple[int, int]
) -> None:
    assert planned(*source, resolution=1024).target == pixel_area
    assert planned(*source, resolution=0.5, resolution_type="area").target == area
    assert planned(*source, resolution=768, resolution_type="pixel").target == pixel


def test_edges_of_square_crops_and_alignment_16() -> None:
    assert planned(3000, 2000, **PIXART).target == (1024, 1024)
    assert planned(3000, 2000, resolution=0.25, resolution_type="area", crop=True).target == (512, 512)
    assert planned(3000, 2000, alignment=16).target == (1248, 832)
    assert planned(4000, 3000, alignment=16).target == (1184, 880)


@pytest.mark.parametrize(
    ("options", "source", "resized"),
    [
        (PIXART, (4000, 3000), (1365, 1024)),
        (PIXART, (1200, 800), (1536, 1024)),
        (PIXART, (900, 700), (1317, 1024)),
        (PIXART, (500, 500), (1024, 1024)),
        (PIXART, (499, 700), None),
        (KONTEXT, (1500, 1500), (1500, 1500)),
        (KONTEXT, (1536, 1536), (1536, 1536)),
        (KONTEXT, (1537, 1536), (1025, 1024)),
        (KONTEXT, (4000, 3000), (1365, 1024)),
        (KONTEXT, (800, 800), (1024, 1024)),
        (KONTEXT, (767, 2000), None),
    ],
)
def test_square_crops(options: dict[str, Any], source: tuple[int, int], resized: tuple[int, int] | None) -> None:
    plan = plan_resize(*source, stem="0001", dataset=dataset(**options), alignment=64)
    assert plan == DropReason.TOO_SMALL if resized is None else isinstance(plan, ResizePlan) and plan.resized == resized


def test_random_crops_depend_on_stem_and_cycle_only() -> None:
    assert planned(4000, 3000, **PIXART).box[:2] == (322, 0)
    assert planned(1500, 1500, **KONTEXT).box[:2] == (449, 123)
    assert planned(1500, 1500, cycle=1, **KONTEXT).box[:2] == (432, 332)


def test_crop_styles() -> None:
    assert planned(4000, 3000, crop_style="corner", **PIXART).box == (0, 0, 1024, 1024)
    assert planned(4000, 3000, crop_style="center", **PIXART).box == (170, 0, 1194, 1024)


def test_downsampling_leaves_room_to_crop_in() -> None:
    plan = planned(4000, 2000, resolution=512, crop=True, maximum_image_size=1024, target_downsample_size=1024)
    assert plan.resized == (1448, 724)  # √2·1024 × 1024/√2
    limits: dict[str, Any] = {"maximum_image_size": 1024, "target_downsample_size": 768}
    plan = planned(4000, 2000, resolution=512, resolution_type="pixel", crop=True, **limits)
    assert plan.resized == (1536, 768)


def test_whole_picture_is_stretched_to_the_target() -> None:
    plan = planned(3000, 2000)
    assert plan.resized == plan.target == (1280, 832)
    assert plan.stretch == pytest.approx((1280 / 832) / 1.5)
    assert bucket_name(plan.target) == "1.54 (1280x832)"


def test_crop_aspects() -> None:
    wide: dict[str, Any] = {"crop": True, "crop_aspect_buckets": [0.5, 1.0, 1.5]}
    assert planned(3000, 2000, crop=True, crop_aspect="preserve").target == (1280, 832)
    assert planned(1600, 1000, crop_aspect="closest", **wide).target == (1280, 832)
    targets = {planned(1600, 1000, f"{i}", crop_aspect="random", **wide).target for i in range(60)}
    assert targets == {(704, 1472), (1024, 1024), (1280, 832)}


def test_filters() -> None:
    def reason(width: int, height: int, **keys: Any) -> object:
        return plan_resize(width, height, stem="x", dataset=dataset(**keys), alignment=64)

    assert reason(100, 300, minimum_aspect_ratio=0.5) == DropReason.ASPECT_OUT_OF_RANGE
    assert reason(300, 100, maximum_aspect_ratio=2) == DropReason.ASPECT_OUT_OF_RANGE
    assert reason(512, 512, crop=True, max_upscale_threshold=0.5) == DropReason.TOO_MUCH_UPSCALE
    assert isinstance(reason(683, 683, crop=True, max_upscale_threshold=0.5), ResizePlan)
    assert reason(767, 3000, resolution_type="pixel", resolution=512, minimum_image_size=768) == DropReason.TOO_SMALL
    # A barred bucket leaves the choice to the others.
    keys: dict[str, Any] = {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": [1.1, 2.05]}
    assert planned(600, 400, resolution=512, **keys).target == (512, 512)
    assert planned(600, 400, resolution=512, max_upscale_threshold=0.2, **keys).target == (704, 384)


sides = st.integers(1, 9000)
options = st.fixed_dictionaries(
    {
        "crop": st.booleans(),
        "crop_style": st.sampled_from(["random", "center", "corner"]),
        "crop_aspect": st.sampled_from(["square", "preserve", "closest", "random"]),
        "crop_aspect_buckets": st.sampled_from([[], [1.0], [0.5, 1.0, 2.0]]),
        "resolution_type": st.sampled_from(["pixel_area", "pixel"]),
        "resolution": st.integers(64, 2048),
        "maximum_image_size": st.sampled_from([None, 300, 1024]),
        "target_downsample_size": st.sampled_from([256, 512]),
    }
)


@given(sides, sides, options, st.sampled_from([8, 16, 64]))
def test_laws(width: int, height: int, keys: dict[str, Any], alignment: int) -> None:
    plan = planned(width, height, alignment=alignment, **keys)
    left, top, right, bottom = plan.box
    assert (right - left, bottom - top) == plan.target
    assert all(side % alignment == 0 and side > 0 for side in plan.target)
    assert left >= 0 and right <= plan.resized[0] and top >= 0 and bottom <= plan.resized[1]
    if keys["crop"]:
        exact = plan.upscale
        assert abs(plan.resized[0] - max(plan.target[0], width * exact)) <= 0.5 + 1e-6 * plan.resized[0]
        assert abs(plan.resized[1] - max(plan.target[1], height * exact)) <= 0.5 + 1e-6 * plan.resized[1]


@given(sides, sides, options)
def test_transpose(width: int, height: int, keys: dict[str, Any]) -> None:
    if keys["crop_aspect"] in ("closest", "random"):  # a tie between two aspects is broken by their order in the list
        keys = keys | {"crop_aspect": "preserve"}
    plan, turned = planned(width, height, **keys), planned(height, width, **keys)
    assert plan.target == turned.target[::-1]
    assert plan.resized == turned.resized[::-1]
