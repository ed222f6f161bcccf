"""Layers, provenance, placeholders, rules between options, every problem at once. training.md §1."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from config_place import BASE, Place, errors, only, warnings
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.directories import Directories
from simpletuner.config.model_options import Precision
from simpletuner.config.resolve import freeze, resolve
from simpletuner.config.rules import QUANTISED
from simpletuner.config.sources import Layer
from simpletuner.errors import UserError
from simpletuner.families.registry import load_spec


def test_a_higher_layer_wins_and_hides(place: Place) -> None:
    low, high = place.object({"seed": 1}, "environment:a"), place.object({"seed": 2}, "environment:b")
    found = place.resolve(low, high, seed=3)
    assert found.values["seed"] == 3
    origin = found.origins["seed"]
    assert origin.layer == "request"
    assert origin.hidden == (("environment:b", 2), ("environment:a", 1), ("default", None))


def test_null_uncovers_the_layer_below(place: Place) -> None:
    found = place.resolve(place.object({"seed": 1}, "environment:a"), seed=None, max_grad_norm=None)
    assert (found.values["seed"], found.origins["seed"].layer) == (1, "environment:a")
    assert (found.values["max_grad_norm"], found.origins["max_grad_norm"].layer) == (0.01, "flavour")
    assert "seed" not in place.resolve(seed=None).explicit


def test_a_given_value_beats_the_family(place: Place) -> None:
    """Acceptance 32."""
    assert place.resolve().values["max_grad_norm"] == 0.01
    found = place.resolve(max_grad_norm=2.0)
    assert found.require().optimizer.max_grad_norm == 2.0
    assert found.origins["max_grad_norm"].hidden == (("flavour", 0.01), ("default", 2.0))


def test_every_value_has_a_layer(place: Place) -> None:
    """Acceptance 6."""
    found = place.resolve(seed=5)
    assert found.origins.keys() == found.values.keys()
    assert set(found.provenance().values()) == {"default", "flavour", "environment:base", "request"}
    _, provenance, _ = freeze(found)
    assert provenance["seed"] == {"layer": "request", "value": 5, "hidden": [{"layer": "default", "value": None}]}


@given(
    layers=st.lists(
        st.dictionaries(
            st.sampled_from(["seed", "train_batch_size", "lr_warmup_steps"]), st.none() | st.integers(1, 9), max_size=3
        ),
        max_size=4,
    )
)
def test_the_merge_is_the_highest_given_value(layers: list[dict[str, int | None]]) -> None:
    names = [f"environment:{index}" for index in range(len(layers))]
    given_layers = [Layer("base", BASE), *(Layer(n, values) for n, values in zip(names, layers, strict=True))]
    found = resolve(given_layers, Directories(Path("/none"), Path("/none")), read_datasets=False)
    for option, default in (("seed", None), ("train_batch_size", 4), ("lr_warmup_steps", 0)):
        rows = [(n, values[option]) for n, values in zip(names, layers, strict=True) if values.get(option) is not None]
        stack = [*reversed(rows), ("default", default)]
        assert found.values[option] == stack[0][1]
        assert [(found.origins[option].layer, stack[0][1]), *found.origins[option].hidden] == stack


def test_defaulted_epochs_give_way_to_steps(place: Place) -> None:
    """Acceptance 7."""
    assert place.resolve(max_train_steps=200).require().run.num_train_epochs == 0
    assert errors(place.resolve(max_train_steps=200, num_train_epochs=1)) == {
        "/--max_train_steps": "both_epochs_and_steps"
    }
    assert errors(place.resolve(max_train_steps=0, num_train_epochs=0)) == {"/--max_train_steps": "no_run_length"}
    assert place.resolve(max_train_steps=0).require().run.num_train_epochs == 1


def test_placeholders_are_replaced_in_the_frozen_job_only(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ST_PLACE", "elsewhere")
    monkeypatch.setenv("ST_DATA", "data")
    found = place.resolve(
        cache_dir_vae="{env:ST_PLACE}/vae",
        validation_prompt="at {env:ST_PLACE}, {env:ST_PLACE}",
        data_backend_config="{env:ST_DATA}.json",
        instance_prompt="of {env:ST_PLACE}",
        output_dir="{env:ST_PLACE}/out",
    )
    assert found.errors == []
    assert found.values["cache_dir_vae"] == "{env:ST_PLACE}/vae"
    config, provenance, datasets = freeze(found)
    assert config["cache_dir_vae"] == str(place.workspace / "elsewhere/vae")
    assert config["output_dir"] == str(place.workspace / "elsewhere/out")
    assert config["validation_prompt"] == "at elsewhere, elsewhere"
    assert provenance["validation_prompt"]["value"] == "at {env:ST_PLACE}, {env:ST_PLACE}"
    assert datasets[0]["cache_dir_vae"] == str(place.workspace / "elsewhere/vae/pictures")
    assert datasets[0]["instance_prompt"] == "of elsewhere"


def test_a_placeholder_that_is_not_set(place: Place) -> None:
    place.write_datasets([place.entry(instance_data_dir="{env:ST_UNSET_B}/x")])
    found = place.resolve(validation_prompt="{env:ST_UNSET_A}", learning_rate=-1)
    assert errors(found) == {
        "/--validation_prompt": "env_not_set",
        "/--learning_rate": "bad_value",
        "/datasets/0/instance_data_dir": "env_not_set",
    }


def test_all_problems_are_answered_at_once(place: Place) -> None:
    """Names, values, rules between options, dataset entries: one answer."""
    place.write_datasets(
        [
            place.entry(crop_stile="random", crop="perhaps"),
            place.entry(maximum_image_size=512, resolution_type="pixel"),
            {"id": "t1", "dataset_type": "text_embeds", "cache_dir": "a"},
            {"id": "t2", "dataset_type": "text_embeds", "cache_dir": "b"},
        ]
    )
    found = place.resolve(
        learnig_rate=1, train_batch_size=0, num_train_epochs=3, base_model_precision="int8-quanto",
        optimizer="adamw_bf17", validation_resolution="100x100", fsdp_enable=True, use_ema="perhaps",
    )  # fmt: skip
    assert errors(found) == {
        "/--learnig_rate": "unknown_field",
        "/--train_batch_size": "bad_value",
        "/--max_train_steps": "both_epochs_and_steps",
        "/--base_model_precision": "quantised_full",
        "/--optimizer": "unknown_optimizer",
        "/--validation_resolution": "bad_resolution",
        "/--fsdp_enable": "incompatible_options",
        "/--use_ema": "bad_boolean",
        "/datasets/0/crop_stile": "unknown_dataset_key",
        "/datasets/0/crop": "bad_boolean",
        "/datasets/1/id": "duplicate_dataset_id",
        "/datasets/1/maximum_image_size": "downsample_pair",
        "/datasets/1/instance_data_dir": "duplicate_dataset_path",
        "/datasets": "text_default",
    }
    with pytest.raises(UserError) as caught:
        found.require()
    assert len(caught.value.problems) == len(found.errors)


def test_a_wrong_value_causes_no_second_complaint(place: Place) -> None:
    """A rule says nothing of options whose own value is wrong."""
    assert errors(place.resolve(max_train_steps="ten", num_train_epochs=0)) == {"/--max_train_steps": "bad_value"}
    assert errors(place.with_datasets([{"id": "pictures"}])) == {"/datasets/0/instance_data_dir": "missing_dataset_key"}
    assert errors(place.resolve(data_backend_config="absent.json")) == {
        "/--data_backend_config": "data_backend_config_missing"
    }


def test_the_dataset_file_is_looked_for_in_both_folders(place: Place) -> None:
    hint = only(place.resolve(data_backend_config="absent.json").errors).hint
    assert str(place.workspace / "absent.json") in hint and str(place.config / "absent.json") in hint
    (place.workspace / "data.json").rename(place.config / "elsewhere.json")
    found = place.resolve(data_backend_config="elsewhere.json")
    assert found.require().data.data_backend_config == str(place.config / "elsewhere.json")


def test_quantised_full(place: Place) -> None:
    """Acceptance 4."""
    assert errors(place.resolve(base_model_precision="int8-quanto")) == {"/--base_model_precision": "quantised_full"}
    for name in ("bf16", "fp32", "no_change"):
        assert errors(place.resolve(base_model_precision=name)) == {}
    for name in QUANTISED:
        assert errors(place.resolve(base_model_precision=name)) == {"/--base_model_precision": "quantised_full"}


def test_a_quantised_base_is_for_adapters(place: Place) -> None:
    for name in QUANTISED:
        refused = errors(place.resolve(base_model_precision=name, model_type="lora")).get("/--base_model_precision")
        assert refused == ("incompatible_options" if name == "fp8-quanto" else None)  # §4.3, PixArt's flavour layer


def test_every_precision_is_a_load_type_or_quantised() -> None:
    assert {"no_change", "bf16", "fp16", "fp32", *QUANTISED} == set(get_args(Precision))


RULES: list[tuple[dict[str, Any], str, str]] = [
    ({"maximum_image_size": 2048}, "/--maximum_image_size", "downsample_pair"),
    ({"resolution_type": "area", "resolution": 21}, "/--resolution", "size_unit"),
    ({"resolution": 63}, "/--resolution", "size_unit"),
    ({"resolution": 512.5}, "/--resolution", "size_unit"),
    ({"resolution_type": "pixel", "resolution": 32}, "/--resolution", "size_unit"),
    ({"gradient_accumulation_steps": 0}, "/--gradient_accumulation_steps", "bad_value"),
    ({"aspect_bucket_alignment": 8}, "/--aspect_bucket_alignment", "incompatible_options"),
    ({"prediction_type": "flow_matching"}, "/--prediction_type", "incompatible_options"),
    ({"optimizer": "adamw"}, "/--optimizer", "unknown_optimizer"),
    ({"validation_method": "external-script"}, "/--validation_external_script", "incompatible_options"),
    ({"post_checkpoint_script": "notify {globalstep}"}, "/--post_checkpoint_script", "unknown_placeholder"),
    ({"post_checkpoint_script": "notify ${HOME}"}, "/--post_checkpoint_script", "unknown_placeholder"),
    ({"post_checkpoint_script": "notify 'it"}, "/--post_checkpoint_script", "bad_script"),
    ({"post_checkpoint_script": " "}, "/--post_checkpoint_script", "bad_script"),
    ({"post_checkpoint_script": "notify {env:NOT_SET_ANYWHERE}"}, "/--post_checkpoint_script", "env_not_set"),
    ({"post_upload_script": "notify {x}"}, "/--post_upload_script", "unknown_placeholder"),
    ({"mixed_precision": "fp16"}, "/--mixed_precision", "option_not_supported_yet"),
    ({"model_flavour": "900M-1024-v0.8"}, "/--model_flavour", "unknown_flavour"),
    ({"timestep_bias_strategy": "range", "timestep_bias_begin": 500, "timestep_bias_end": 500},
     "/--timestep_bias_begin", "incompatible_options"),
    ({"refiner_training": True, "refiner_training_strength": 0},
     "/--refiner_training_strength", "incompatible_options"),
    ({"refiner_training": True, "refiner_training_strength": 1, "refiner_training_invert_schedule": True},
     "/--refiner_training_strength", "incompatible_options"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "pointer", "code"), RULES)
def test_a_rule_names_its_option(place: Place, options: dict[str, Any], pointer: str, code: str) -> None:
    assert errors(place.resolve(place.object({"train_batch_size": 1}), **options))[pointer] == code


NO_EFFECTS: list[tuple[dict[str, Any], str]] = [
    ({"flow_schedule_shift": 3.0}, "flow_schedule_shift"),
    ({"lora_rank": 4}, "lora_rank"),
    ({"early_stop_patience": 3}, "early_stop_patience"),
    ({"validation_preview_steps": 4}, "validation_preview_steps"),
    (
        {"validation_method": "external-script", "validation_external_script": "true", "validation_preview": True},
        "validation_preview",
    ),
    ({"num_eval_images": 2}, "num_eval_images"),
    ({"conditioning_multidataset_sampling": "combined"}, "conditioning_multidataset_sampling"),
    ({"masked_loss_probability": 0.5}, "masked_loss_probability"),
    ({"flux_guidance_value": 2.0}, "flux_guidance_value"),
    ({"clip_skip": 2}, "clip_skip"),
    ({"ema_decay": 0.9}, "ema_decay"),
    ({"ema_validation": "none"}, "ema_validation"),
    ({"huber_c": 0.2}, "huber_c"),
    ({"noise_offset": 0.2}, "noise_offset"),
    ({"timestep_bias_multiplier": 2}, "timestep_bias_multiplier"),
    ({"dataloader_prefetch": False, "dataloader_prefetch_qlen": 3}, "dataloader_prefetch_qlen"),
    ({"tracker_run_name": "x"}, "tracker_run_name"),
    ({"lr_num_cycles": 2}, "lr_num_cycles"),
    ({"lr_power": 2}, "lr_power"),
    ({"lr_end": 0, "lr_scheduler": "constant"}, "lr_end"),
    ({"refiner_training_strength": 0.5}, "refiner_training_strength"),
    ({"optimizer": "prodigy", "lr_scheduler": "cosine"}, "lr_scheduler"),
    ({"optimizer": "optimi-stableadamw", "max_grad_norm": 1.0}, "max_grad_norm"),
    ({"optimizer": "adamw_schedulefree", "lr_scheduler": "cosine"}, "lr_scheduler"),
    ({"quantize_via": "cpu"}, "quantize_via"),
    ({"validation_external_script": "draw {validation_prompt}"}, "validation_external_script"),
    ({"validation_external_background": True}, "validation_external_background"),
    (
        {"validation_method": "external-script", "validation_external_script": "draw", "disable_benchmark": True},
        "disable_benchmark",
    ),
]


@pytest.mark.parametrize(("options", "name"), NO_EFFECTS)
def test_an_option_that_cannot_act_says_so(place: Place, options: dict[str, Any], name: str) -> None:
    found = place.resolve(**options)
    problem = only([problem for problem in found.warnings if problem.code == "option_no_effect"])
    assert (problem.option, found.errors) == (name, [])
    assert f"--{name} has no effect: " in problem.message


def test_a_warm_up_longer_than_the_run(place: Place) -> None:
    assert warnings(place.resolve(lr_warmup_steps=10)) == {"/--lr_warmup_steps": "warmup_too_long"}
    assert warnings(place.resolve(lr_warmup_steps=9)) == {}


def test_families_and_flavours(place: Place) -> None:
    near = only(resolve([place.object(BASE | {"model_family": "pixart_sigm"})], place.directories).errors)
    assert (near.code, near.pointer) == ("unknown_family", "/--model_family")
    assert "pixart_sigma" in near.hint
    assert only(place.resolve(model_family="sdxl").errors).code == "option_not_supported_yet"
    assert "v0.7-stage1" in only(place.resolve(model_flavour="900M-1024-v0.7-stag1").errors).hint
    for name in load_spec("pixart_sigma").flavours:
        assert errors(place.resolve(model_flavour=name)) == {}, name


def test_the_experts_train_their_own_range(place: Place) -> None:
    stage1 = place.resolve(model_flavour="900M-1024-v0.7-stage1").require().loss
    stage2 = place.resolve(model_flavour="900M-1024-v0.7-stage2").require().loss
    assert (stage1.refiner_training, stage1.refiner_training_invert_schedule) == (True, True)
    assert (stage2.refiner_training, stage2.refiner_training_invert_schedule) == (True, False)
    assert stage1.refiner_training_strength == stage2.refiner_training_strength == 0.2


@pytest.mark.parametrize("seed", [None, 0, -1])
def test_a_seed_is_drawn_when_the_job_is_frozen(place: Place, seed: int | None) -> None:
    drawn = {freeze(place.resolve(seed=seed))[0]["seed"] for _ in range(3)}
    assert len(drawn) == 3 and all(0 < value < 2**31 for value in drawn)
    assert freeze(place.resolve(seed=7))[0]["seed"] == 7


def test_paths_are_frozen_absolute(place: Place) -> None:
    place.write_datasets([place.entry()])
    config, _, datasets = freeze(place.resolve(cache_dir="c", resume_from_checkpoint="old/checkpoint-5"))
    assert config["output_dir"] == str(place.workspace / "out")
    assert datasets[0]["instance_data_dir"] == str(place.pictures)
    assert datasets[0]["cache_dir_vae"] == str(place.workspace / "c/cache/vae/pixart_sigma/pictures")
    assert datasets[1]["cache_dir"] == str(place.workspace / "cache")
    assert config["resume_from_checkpoint"] == str(place.workspace / "old/checkpoint-5")
    assert freeze(place.resolve(resume_from_checkpoint="checkpoint-5"))[0]["resume_from_checkpoint"] == "checkpoint-5"


def test_a_missing_folder_warns_until_the_start(place: Place) -> None:
    shutil.rmtree(place.pictures)
    pointer = "/datasets/0/instance_data_dir"
    assert warnings(place.resolve()) == {pointer: "dataset_path_missing"}
    assert errors(place.resolve(for_start=True)) == {pointer: "dataset_path_missing"}


def test_an_output_folder_that_is_a_file(place: Place) -> None:
    (place.workspace / "out").write_text("")
    assert errors(place.resolve(for_start=True)) == {"/--output_dir": "output_dir_not_writable"}


def test_a_mistake_costs_no_second_and_no_torch(tmp_path: Path) -> None:
    """Acceptance 3."""
    code = (
        "import sys; from pathlib import Path\n"
        "from simpletuner.config.directories import Directories\n"
        "from simpletuner.config.resolve import resolve\n"
        "from simpletuner.config.sources import layer_from_argv\n"
        "from simpletuner.config.train_config import option_fields\n"
        "words = ['--model_family=pixart_sigma', '--learnig_rate', '1', '--max_train_steps=1']\n"
        "layer = layer_from_argv(words, name='request', known=option_fields())\n"
        "found = resolve([layer], Directories(Path(), Path()))\n"
        "print([p.hint for p in found.errors if p.code == 'unknown_field'], 'torch' in sys.modules)\n"
    )
    started_at = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.strip() == "['Did you mean --learning_rate?'] False"
    assert time.monotonic() - started_at < 20  # a second on a free core
