"""How one value is written and read. training.md §1, the first table."""

from __future__ import annotations

import json
from typing import Any

import pytest
from config_place import Place, errors, only, warnings
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.option import OptionField
from simpletuner.config.reserved import LATER, LATER_PREFIXES, NO_EFFECT
from simpletuner.config.sources import NOT_GIVEN, parse_boolean, parse_value
from simpletuner.config.train_config import option_fields

OPTIONS = option_fields()


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate=3e-4"],
        ["learning_rate=3e-4"],
        ["--learning_rate", "3e-4"],
        ["--use_ema", "--learning_rate", "3e-4"],
        ["--learning_rate", "3e-4", "--use_ema"],
    ],
)
def test_every_spelling_is_one_option(place: Place, words: list[str]) -> None:
    found = place.argv(words)
    assert (found.values["learning_rate"], found.errors) == (3e-4, [])
    assert found.values["use_ema"] is ("--use_ema" in words)
    assert found.explicit["learning_rate"] == "3e-4"


def test_the_dashed_spelling_wins_whatever_the_order(place: Place) -> None:
    for pairs in [{"--seed": 1, "seed": 2}, {"seed": 2, "--seed": 1}]:
        found = place.resolve(place.object(pairs))
        assert found.values["seed"] == 1
        assert warnings(found) == {"/--seed": "duplicate_option"}


def test_the_last_of_a_repeated_field_wins(place: Place) -> None:
    found = place.form(("--seed", "1"), ("--seed", "2"))
    assert found.values["seed"] == 2
    assert [problem.code for problem in found.warnings] == ["duplicate_option"]


def test_fields_of_the_form_itself(place: Place) -> None:
    found = place.form(
        ("__active_tab__", "model"), ("__disabled_fields__", "--seed, use_ema"), ("--seed", "5"), ("use_ema", "true")
    )
    assert (found.values["seed"], found.values["use_ema"], found.errors) == (None, False, [])
    assert only(place.form(("__other__", "1")).errors).code == "unknown_field"


@pytest.mark.parametrize("text", ["true", "1", "yes", "on", "false", "0", "no", "off"])
def test_booleans_in_any_case(place: Place, text: str) -> None:
    wanted = text in ("true", "1", "yes", "on")
    for written in (text, text.upper(), text.capitalize(), f" {text} "):
        assert parse_boolean(written) is wanted
        assert place.resolve(use_ema=written).values["use_ema"] is wanted
        assert place.form(("--use_ema", written)).values["use_ema"] is wanted


def test_a_json_string_false_is_false(place: Place) -> None:
    assert place.resolve(use_ema="False").values["use_ema"] is False


@pytest.mark.parametrize("raw", ["maybe", "2", 2, "t", [], 1.5])
def test_everything_else_is_no_boolean(place: Place, raw: Any) -> None:
    assert errors(place.resolve(use_ema=raw)) == {"/--use_ema": "bad_boolean"}


@pytest.mark.parametrize("raw", ["nan", "inf", "-inf", "Infinity", float("inf"), float("nan"), "1e999", "one", True])
@pytest.mark.parametrize("name", ["learning_rate", "lr_end", "ema_decay", "resolution", "validation_guidance"])
def test_numbers_are_finite(place: Place, name: str, raw: Any) -> None:
    assert errors(place.resolve(**{name: raw})) == {f"/--{name}": "bad_value"}


@pytest.mark.parametrize("raw", ["1.5", 1.5, "1e3", "ten", True, "inf", "1_000"])
def test_integers_have_no_fraction(place: Place, raw: Any) -> None:
    assert errors(place.resolve(train_batch_size=raw)) == {"/--train_batch_size": "bad_value"}


def test_numbers_may_be_text(place: Place) -> None:
    found = place.resolve(learning_rate="1e-4", train_batch_size=" 8 ", max_train_steps="10")
    assert (found.values["learning_rate"], found.values["train_batch_size"], found.errors) == (1e-4, 8, [])


@pytest.mark.parametrize("seed", [-2, 2**63, "1e400"])
def test_a_seed_fits_a_generator(place: Place, seed: Any) -> None:
    assert errors(place.resolve(seed=seed)) == {"/--seed": "bad_value"}


def test_the_empty_string(place: Place) -> None:
    """∅ where ∅ is legal, the off value where there is one, else not given."""
    found = place.resolve(
        resume_from_checkpoint="",
        snr_gamma="",
        learning_rate="",
        use_ema="",
        validation_negative_prompt="",
        report_to="",
    )
    assert found.errors == []
    assert found.values["resume_from_checkpoint"] is None and found.values["snr_gamma"] is None
    assert found.values["learning_rate"] == 1e-5 and found.origins["learning_rate"].layer == "default"
    assert found.values["validation_negative_prompt"] == "" and found.values["report_to"] == "none"


def test_a_choice_names_the_nearest(place: Place) -> None:
    problem = only(place.resolve(lr_scheduler="cosin").errors)
    assert (problem.code, problem.pointer) == ("bad_choice", "/--lr_scheduler")
    assert "Did you mean cosine?" in problem.hint and "polynomial" in problem.hint


def test_an_unknown_option_names_the_nearest(place: Place) -> None:
    problem = only(place.argv(["--learnig_rate", "1"]).errors)
    assert (problem.code, problem.pointer) == ("unknown_field", "/--learnig_rate")
    assert problem.hint == "Did you mean --learning_rate?"
    assert only(place.argv(["--qqq=1"]).errors).hint == ""


@pytest.mark.parametrize(
    ("old", "value", "new", "wanted"),
    [
        ("validation_steps", 7, "validation_step_interval", 7),
        ("checkpointing_steps", "7", "checkpoint_step_interval", 7),
        ("save_total_limit", 2, "checkpoints_total_limit", 2),
    ],
)
def test_old_names(place: Place, old: str, value: Any, new: str, wanted: Any) -> None:
    found = place.resolve(**{old: value})
    assert (found.values[new], found.errors) == (wanted, [])
    assert warnings(found) == {f"/--{old}": "legacy_option"}


@pytest.mark.parametrize(
    ("old", "new"), [("vae_cache_preprocess", "vae_cache_ondemand"), ("ignore_final_epochs", "strict_epoch_limit")]
)
def test_old_names_of_the_opposite_meaning(place: Place, old: str, new: str) -> None:
    """They warn; what asks for the default of the new name changes nothing, the other value is not built yet."""
    harmless = place.resolve(**{old: True})
    assert warnings(harmless)[f"/--{old}"] == "legacy_option"
    assert errors(harmless) == {}
    assert set(errors(place.resolve(**{old: False})).values()) == {"option_not_supported_yet"}


def test_old_schedules(place: Place) -> None:
    found = place.resolve(lr_scheduler="cosine_with_warmup", lr_warmup_steps=2)
    assert (found.values["lr_scheduler"], warnings(found)) == ("cosine", {"/--lr_scheduler": "legacy_option"})
    found = place.resolve(lr_scheduler="constant", lr_warmup_steps=2)
    assert (found.values["lr_scheduler"], warnings(found)) == (
        "constant_with_warmup",
        {"/--lr_scheduler": "legacy_option"},
    )
    assert place.resolve(lr_scheduler="constant").values["lr_scheduler"] == "constant"


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_options_without_effect_say_why(place: Place, name: str) -> None:
    problem = only(place.resolve(**{name: True}).problems)
    assert (problem.code, problem.level, problem.pointer) == ("option_no_effect", "warning", f"/--{name}")
    assert NO_EFFECT[name] in problem.message


@pytest.mark.parametrize("name", sorted(LATER) + [prefix + "x" for prefix in LATER_PREFIXES])
def test_options_still_to_come_say_so(place: Place, name: str) -> None:
    problem = only(place.resolve(**{name: "1"}).errors)
    assert (problem.code, problem.pointer) == ("option_not_supported_yet", f"/--{name}")
    assert f"--{name} " in problem.message


def test_every_option_of_the_contract_is_known() -> None:
    """Acceptance 5, for the names of §2 that people write most; the whole surface is a golden file."""
    for name in ("lr_num_cycles", "flux_lora_target", "fsdp_enable", "tread_config", "crepa_start", "ema_device"):
        assert name in OPTIONS or name in LATER or name.startswith(LATER_PREFIXES), name


STRUCTURED = [{"night": "a night"}, '{"night": "a night"}']


@pytest.mark.parametrize("written", STRUCTURED)
def test_a_structure_is_an_object_or_its_text(place: Place, written: Any) -> None:
    found = place.resolve(user_prompt_library=written)
    assert found.require().validation.user_prompt_library == {"night": "a night"}


def test_a_structure_may_be_a_file(place: Place) -> None:
    (place.config / "prompts.json").write_text(json.dumps(STRUCTURED[0]))
    assert place.resolve(user_prompt_library="prompts.json").require().validation.user_prompt_library == STRUCTURED[0]


@pytest.mark.parametrize("content", ["[1]", '"text"', "{", "\xff", '{"a": 1}', '{"a b": "x", "a_b": "y"}'])
def test_a_bad_library_is_an_answer(place: Place, content: str) -> None:
    (place.config / "prompts.json").write_bytes(content.encode("latin-1"))
    found = place.resolve(user_prompt_library="prompts.json")
    assert [problem.pointer for problem in found.errors] == ["/--user_prompt_library"]
    assert only(place.resolve(user_prompt_library="absent.json").errors).code == "bad_prompt_library"


@pytest.mark.parametrize("text", ['{"a": ', "[1,, 2]", '{"a": NaN}'])
def test_broken_json_text(place: Place, text: str) -> None:
    assert errors(place.resolve(user_prompt_library=text)) == {"/--user_prompt_library": "bad_json"}


@pytest.mark.parametrize("written", ["1000x", "100x100", "64x", "abc", 0, [], "0x0", ["64x64", "65x64"], "1024x-64"])
def test_a_bad_resolution_is_found_before_the_start(place: Place, written: Any) -> None:
    assert errors(place.resolve(validation_resolution=written)) == {"/--validation_resolution": "bad_resolution"}


@pytest.mark.parametrize(
    "written", ["1024x1024", 512, "512", [64, "96x64"], '["96x64", 512]', "64x64, 96x64", "1.0", 0.5]
)
def test_resolutions_that_can_be_drawn(place: Place, written: Any) -> None:
    assert errors(place.resolve(validation_resolution=written)) == {}


@given(
    st.sampled_from([o for o in OPTIONS.values() if not o.ui.later]),
    st.text(max_size=12) | st.integers() | st.none() | st.booleans() | st.floats(),
)
def test_any_value_is_typed_or_a_problem(option: OptionField, raw: Any) -> None:
    """What is accepted is a value of the type, and means the same when it is read again."""
    if raw is None:
        return
    value, problem = parse_value(option, raw, is_text=False)
    if problem is not None:
        assert (problem.option, problem.pointer, value) == (option.name, f"/--{option.name}", NOT_GIVEN)
    elif value is not NOT_GIVEN:
        assert option.adapter().validate_python(value) == value
        if value not in (None, "") and option.kind != "structured":
            assert parse_value(option, value, is_text=False) == (value, None)
