"""The dataset file: every mistake has a code and a place. training.md §3.1."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from config_place import Place, errors, only, warnings

from simpletuner.config.dataset_options import LATER_KEYS, NO_EFFECT_KEYS, ImageDataset

ENTRY_MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"crop_stile": "random"}, "crop_stile", "unknown_dataset_key"),
    ({"crop": "perhaps"}, "crop", "bad_boolean"),
    ({"crop_style": "middle"}, "crop_style", "bad_value"),
    ({"repeats": -1}, "repeats", "bad_value"),
    ({"repeats": 1.5}, "repeats", "bad_value"),
    ({"probability": "inf"}, "probability", "bad_value"),
    ({"caption_dropout_probability": 1.1}, "caption_dropout_probability", "bad_value"),
    ({"dataset_type": "imag"}, "dataset_type", "bad_choice"),
    ({"conditioning_type": "controlnet"}, "conditioning_type", "option_not_supported_yet"),
    ({"type": "webshart"}, "type", "option_not_supported_yet"),
    ({"type": "lokal"}, "type", "bad_choice"),
    ({"id": "a/b"}, "id", "bad_value"),
    ({"id": ".."}, "id", "bad_value"),
    ({"id": ""}, "id", "missing_dataset_key"),
    ({"instance_data_dir": None}, "instance_data_dir", "missing_dataset_key"),
    ({"caption_strategy": "instanceprompt"}, "instance_prompt", "missing_dataset_key"),
    ({"prepend_instance_prompt": True}, "instance_prompt", "missing_dataset_key"),
    ({"caption_strategy": "parquet"}, "parquet", "missing_dataset_key"),
    ({"crop_aspect": "closest"}, "crop_aspect_buckets", "missing_dataset_key"),
    ({"maximum_image_size": 2048}, "maximum_image_size", "downsample_pair"),
    ({"resolution": 1024, "resolution_type": "area"}, "resolution", "size_unit"),
    ({"minimum_image_size": 0.25}, "minimum_image_size", "size_unit"),
]


@pytest.mark.parametrize(("keys", "key", "code"), ENTRY_MISTAKES)
def test_a_mistake_in_an_entry_has_a_place(place: Place, keys: dict[str, Any], key: str, code: str) -> None:
    assert errors(place.with_datasets([place.entry(id="first", instance_data_dir="first"), place.entry(**keys)])) == {
        f"/datasets/1/{key}": code
    }


def test_an_unknown_key_names_the_nearest(place: Place) -> None:
    problem = only(place.with_datasets([place.entry(crop_stile="random")]).errors)
    assert problem.hint == "Did you mean 'crop_style'?"


@pytest.mark.parametrize("key", sorted(LATER_KEYS))
def test_keys_still_to_come(place: Place, key: str) -> None:
    assert errors(place.with_datasets([place.entry(**{key: 1})])) == {f"/datasets/0/{key}": "option_not_supported_yet"}


@pytest.mark.parametrize("key", sorted(NO_EFFECT_KEYS))
def test_keys_without_effect(place: Place, key: str) -> None:
    found = place.with_datasets([place.entry(**{key: 1})])
    assert (errors(found), warnings(found)) == ({}, {f"/datasets/0/{key}": "option_no_effect"})


FILE_MISTAKES = [("{}", "bad_dataset_file"), ("[", "bad_json"), ("nope", "bad_json"), ("[NaN]", "bad_json")]


@pytest.mark.parametrize(("text", "code"), FILE_MISTAKES)
def test_a_file_that_is_no_list(place: Place, text: str, code: str) -> None:
    assert errors(place.with_datasets(text)) == {"/--data_backend_config": code}


def test_a_file_that_is_no_text(place: Place) -> None:
    (place.workspace / "data.json").write_bytes(b"\xff\xfe[]")
    assert errors(place.resolve()) == {"/--data_backend_config": "bad_json"}


@pytest.mark.parametrize("entry", [1, "x", [], None])
def test_an_entry_that_is_no_object(place: Place, entry: Any) -> None:
    assert errors(place.with_datasets([place.entry(), entry])) == {"/datasets/1": "bad_dataset"}


def test_nothing_to_train_on(place: Place) -> None:
    assert errors(place.with_datasets([])) == {"/datasets": "nothing_to_train_on"}
    assert errors(place.with_datasets([place.entry(disabled="yes")])) == {"/datasets": "nothing_to_train_on"}
    assert errors(place.with_datasets([place.entry(dataset_type="eval")])) == {"/datasets": "nothing_to_train_on"}


def test_disable_is_disabled(place: Place) -> None:
    found = place.with_datasets([place.entry(), place.entry(id="b", instance_data_dir="b", disable="True")])
    assert [entry.id for entry in found.require().image_datasets] == ["pictures"]


def test_doubled_keys(place: Place) -> None:
    """Acceptance 2: equal `id`, doubled `crop`: warnings with their places; two ids in one entry are an error."""
    entry = '{"id": "pictures", "id": "pictures",\n  "crop": true,\n  "crop": false, "instance_data_dir": "pictures"}'
    text = f"[\n {entry}\n]"
    found = place.with_datasets(text)
    assert (errors(found), warnings(found)) == (
        {},
        {"/datasets/0/id": "duplicate_key", "/datasets/0/crop": "duplicate_key"},
    )
    assert any("data.json, line 4" in problem.message for problem in found.warnings)
    assert found.require().image_datasets[0].crop is False
    assert errors(place.with_datasets(text.replace('"id": "pictures",', '"id": "other",', 1))) == {
        "/datasets/0/id": "duplicate_key"
    }


def test_two_entries_of_one_id(place: Place) -> None:
    found = place.with_datasets([place.entry(), place.entry(instance_data_dir="x")])
    assert errors(found) == {"/datasets/1/id": "duplicate_dataset_id"}


def test_a_text_cache_inside_the_pictures(place: Place) -> None:
    cache = {"id": "text", "dataset_type": "text_embeds", "cache_dir": "pictures/cache"}
    assert errors(place.with_datasets([place.entry(), cache])) == {
        "/datasets/0/instance_data_dir": "cache_inside_dataset"
    }


def test_the_default_text_cache(place: Place) -> None:
    def text(name: str, **keys: Any) -> dict[str, Any]:
        return {"id": name, "dataset_type": "text_embeds", "cache_dir": name} | keys

    assert place.resolve().require().text_embeds.cache_dir == str(place.workspace / "cache")
    assert place.with_datasets([place.entry(), text("a")]).require().text_embeds.id == "a"
    found = place.with_datasets([place.entry(), text("a"), text("b", default=True)])
    assert found.require().text_embeds.id == "b"
    for both in (True, False):
        entries = [place.entry(), text("a", default=both), text("b", default=both)]
        assert errors(place.with_datasets(entries)) == {"/datasets": "text_default"}


def test_a_key_left_out_or_null_takes_the_option(place: Place) -> None:
    place.write_datasets([place.entry(resolution=None, caption_strategy="", repeats=None)])
    found = place.resolve(resolution=512, caption_strategy="textfile", caption_dropout_probability=0.5)
    entry = found.require().image_datasets[0]
    assert (entry.resolution, entry.caption_strategy, entry.caption_dropout_probability, entry.repeats) == (
        512, "textfile", 0.5, 0,
    )  # fmt: skip
    place.write_datasets([place.entry(resolution=640)])
    assert place.resolve(resolution=512).require().image_datasets[0].resolution == 640


def test_values_may_be_text(place: Place) -> None:
    entry = place.with_datasets([place.entry(crop="True", repeats="2", resolution="512")]).require().image_datasets[0]
    assert (entry.crop, entry.repeats, entry.resolution) == (True, 2, 512)


def conditioned(place: Place, *, data: Any = "mates", **keys: Any) -> list[dict[str, Any]]:
    shutil.copytree(place.pictures, place.workspace / "mates", dirs_exist_ok=True)
    mates = {"id": "mates", "dataset_type": "conditioning", "instance_data_dir": "mates"}
    return [place.entry(conditioning_data=data), mates | keys]


def test_conditioning_sets(place: Place) -> None:
    config = place.with_datasets(conditioned(place)).require()
    assert config.image_datasets[0].conditioning_data == ["mates"]
    (mates,) = config.conditioning_datasets
    assert (mates.conditioning_type, mates.caption_strategy) == ("reference_loose", None)
    forced = place.with_datasets(conditioned(place, dataset_type="image", conditioning_type="mask"))
    assert forced.require().conditioning_datasets[0].conditioning_type == "mask"
    found = place.with_datasets(conditioned(place, caption_strategy="textfile", repeats=3))
    told = {f"/datasets/1/{key}": "option_no_effect" for key in ("caption_strategy", "repeats")}
    assert (errors(found), warnings(found)) == ({}, told)
    assert place.with_datasets(conditioned(place, caption_strategy=None)).warnings == []
    found = place.with_datasets([place.entry(), conditioned(place)[1]])
    assert warnings(found) == {"/datasets/1": "option_no_effect"}


LINKS: list[tuple[Any, str, dict[str, Any]]] = [
    ("mate", "unknown_conditioning", {}),
    ("pictures", "unknown_conditioning", {}),
    ("mates", "unknown_conditioning", {"disabled": True}),
    (["mates", "mates"], "bad_conditioning", {}),
]


@pytest.mark.parametrize(("data", "code", "keys"), LINKS)
def test_links_to_conditioning_sets(place: Place, data: Any, code: str, keys: dict[str, Any]) -> None:
    found = place.with_datasets(conditioned(place, data=data, **keys))
    assert errors(found) == {"/datasets/0/conditioning_data": code}
    if data == "mate":
        assert only(found.errors).hint.startswith("Did you mean 'mates'?")


def test_one_mask_a_dataset(place: Place) -> None:
    entries = conditioned(place, data=["mates", "more"], conditioning_type="mask")
    more = entries[1] | {"id": "more", "instance_data_dir": "more", "conditioning_type": "segmentation"}
    found = place.with_datasets([*entries, more])
    assert errors(found) == {"/datasets/0/conditioning_data": "bad_conditioning"}


def test_files_without_a_mate_warn(place: Place) -> None:
    entries = conditioned(place)
    (place.workspace / "mates/a.png").unlink()
    for name in ("pictures/a.png", "pictures/b.png", "pictures/deep/c.png", "mates/b.jpg", "mates/b.webp"):
        (place.workspace / name).parent.mkdir(exist_ok=True)
        (place.workspace / name).touch()
    (place.workspace / "mates/deep").mkdir()
    (place.workspace / "mates/deep/c.jpg").touch()
    found = place.with_datasets(entries)
    assert [(problem.code, problem.pointer) for problem in found.warnings] == [
        ("pair_missing", "/datasets/0/conditioning_data"),
        ("pair_ambiguous", "/datasets/0/conditioning_data"),
    ]
    assert "a.png" in found.warnings[0].message and "b.jpg or b.webp" in found.warnings[1].message
    assert place.resolve(for_start=True).ok, "files are counted again, as errors, before a model is loaded"


def test_captions_of_held_out_pictures_are_not_dropped(place: Place) -> None:
    found = place.with_datasets([place.entry(), place.entry(id="eval", dataset_type="eval", instance_data_dir="e")])
    assert found.require().eval_datasets[0].caption_dropout_probability == 0
    assert (
        found.require().image_datasets[0].caption_dropout_probability
        == ImageDataset.model_fields["caption_dropout_probability"].default
    )
