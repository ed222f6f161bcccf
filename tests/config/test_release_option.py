"""What `--optimizer_release_gradients` goes with. training.md §2.3."""

from __future__ import annotations

from typing import Any

import pytest
from config_place import Place, only

GOOD: dict[str, Any] = {"optimizer_release_gradients": True, "max_grad_norm": 0}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"optimizer": "torch-adamw"},
        {"optimizer": "optimi-lion"},
        {"max_grad_norm": 0.5, "grad_clip_method": "value"},
        {"num_processes": 2},
    ],
    ids=str,
)
def test_what_it_goes_with(place: Place, given: dict[str, Any]) -> None:
    assert place.resolve(**GOOD | given).require().optimizer.optimizer_release_gradients


@pytest.mark.parametrize(
    ("given", "pointer", "told"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm", "Set --max_grad_norm 0"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "over 2 micro-batches"),
        ({"optimizer": "optimi-adamw"}, "optimizer", "adamw_bf16, torch-adamw or optimi-lion"),
        ({"fsdp_enable": True, "num_processes": 2}, "optimizer_release_gradients", "--fsdp_enable"),
    ],
)
def test_what_cannot_be(place: Place, given: dict[str, Any], pointer: str, told: str) -> None:
    problem = only(place.resolve(**GOOD | given).errors)
    assert (problem.pointer, problem.code) == (f"/--{pointer}", "incompatible_options")
    assert told in f"{problem.message} {problem.hint}"
    assert not place.resolve(**GOOD | given | {"optimizer_release_gradients": False}).errors


def test_the_familys_norm_has_to_be_taken_away(place: Place) -> None:
    """It is set by nobody, so that nobody would think of it: the hint says what to write."""
    problem = only(place.resolve(optimizer_release_gradients=True).errors)
    assert problem.pointer == "/--max_grad_norm" and "--grad_clip_method value" in str(problem.hint)


def test_an_optimizer_that_there_is_not_is_told_once(place: Place) -> None:
    assert only(place.resolve(**GOOD, optimizer="lino").errors).code == "unknown_optimizer"
