"""Which libraries a trainer's start leaves out."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from simpletuner.train.unused import leave_out

PLAIN = {"model_type": "lora", "optimizer": "adamw_bf16", "base_model_precision": "no_change", "memory_budget": None}
QUANTISERS = {"bitsandbytes", "torchao", "optimum"}


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        ({}, QUANTISERS),
        ({"model_type": "full"}, QUANTISERS | {"peft", "lycoris"}),
        ({"base_model_precision": "int8-quanto"}, QUANTISERS - {"optimum"}),
        ({"memory_budget": "auto"}, QUANTISERS - {"optimum"}),
        ({"base_model_precision": "nf4-bnb"}, QUANTISERS - {"bitsandbytes"}),
        ({"optimizer": "ao-adamw8bit"}, QUANTISERS - {"torchao"}),
    ],
)
def test_only_what_no_option_names(
    changes: dict[str, Any], left_out: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules: dict[str, Any] = {}
    monkeypatch.setattr(sys, "modules", modules)
    leave_out(PLAIN | changes)
    monkeypatch.undo()
    assert {name for name, module in modules.items() if module is None} == left_out


def test_a_library_that_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = dict.fromkeys(QUANTISERS, sys)
    monkeypatch.setattr(sys, "modules", modules)
    leave_out(PLAIN)
    monkeypatch.undo()
    assert modules == dict.fromkeys(QUANTISERS, sys)
