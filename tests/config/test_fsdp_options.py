"""What `--fsdp_enable` goes with. training.md §2.11."""

from __future__ import annotations

from typing import Any

import pytest
from config_place import Place, only

SPLIT: dict[str, Any] = {"fsdp_enable": True, "num_processes": 2}


def test_defaults_of_the_contract(place: Place) -> None:
    options = place.resolve(**SPLIT).require().fsdp
    assert options.model_dump() == {
        "fsdp_enable": True,
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": None,
        "fsdp_cpu_offload": False,
    }


@pytest.mark.parametrize(
    ("given", "pointer", "code", "told"),
    [
        ({"num_processes": 1}, "fsdp_enable", "incompatible_options", "--num_processes"),
        ({"fsdp_version": 1}, "fsdp_version", "option_not_supported_yet", "What is built is 2."),
        ({"base_model_precision": "int8-quanto", "model_type": "lora"}, "fsdp_enable", "incompatible_options", "int8"),
        ({"optimizer": "muon"}, "optimizer", "option_not_supported_yet", "adamw_bf16"),
        ({"dynamo_backend": "inductor"}, "dynamo_backend", "option_not_supported_yet", "compiled"),
        ({"memory_budget": "auto"}, "memory_budget", "option_not_supported_yet", "--fsdp_enable"),
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload", "option_not_supported_yet", "false"),
        ({"fsdp_state_dict_type": "FULL_STATE_DICT"}, "fsdp_state_dict_type", "option_not_supported_yet", "SHARDED"),
        ({"fsdp_auto_wrap_policy": "NO_WRAP"}, "fsdp_auto_wrap_policy", "option_not_supported_yet", "TRANSFORMER"),
        ({"fsdp_auto_wrap_policy": "PERHAPS"}, "fsdp_auto_wrap_policy", "bad_choice", "TRANSFORMER_BASED_WRAP"),
    ],
)  # fmt: skip
def test_what_cannot_be(place: Place, given: dict[str, Any], pointer: str, code: str, told: str) -> None:
    problem = only(place.resolve(**SPLIT | given).errors)
    assert (problem.pointer, problem.code) == (f"/--{pointer}", code)
    assert told in f"{problem.message} {problem.hint}"


def test_without_it_the_others_do_nothing(place: Place) -> None:
    problem = only(place.resolve(fsdp_reshard_after_forward=False).problems)
    assert (problem.code, problem.level) == ("option_no_effect", "warning")
