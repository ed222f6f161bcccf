"""Several processes for one run. training.md §3.7, §6.2, §9; acceptance 31, 38."""

from __future__ import annotations

import json
import os
import random
import signal
from functools import partial
from typing import Any

import pytest
import torch
from rank_world import run_ranks
from tiny_world import Hook, Ran, TinyWorld

from simpletuner.errors import ExitCode
from simpletuner.job import Command, CommandName

LONG: dict[str, Any] = {
    "num_processes": 2,
    "max_train_steps": 6,
    "gradient_accumulation_steps": 2,
    "checkpoint_step_interval": 2,
    "checkpoints_total_limit": 0,
    "use_ema": True,
}


def two(world: TinyWorld, name: str, **options: Any) -> Ran:
    ran, codes = run_ranks(world, world.job(output_dir=name, **LONG | options))
    assert codes == [0, 0]
    return ran


@pytest.fixture(scope="module")
def straight(shared: TinyWorld) -> Ran:
    return two(shared, "two-ranks")


def test_two_ranks_are_one_with_twice_the_batch(shared: TinyWorld, straight: Ran) -> None:
    one = shared.run(output_dir="one-rank", **LONG | {"num_processes": 1, "train_batch_size": 4})
    rows = list(zip(one.metrics(), straight.metrics(), strict=True))
    assert len(rows) == 6
    for left, right in rows:
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
        assert left["epoch"] == right["epoch"]
    for part in ("transformer", "transformer_ema"):
        weights = [ran.weights(6, part) for ran in (one, straight)]
        # The gradient of a key's bias is zero but for rounding, which Adam makes steps of.
        for name, tensor in weights[0].items():
            if name.endswith("to_k.bias"):
                continue
            assert torch.allclose(tensor, weights[1][name], atol=2e-5), name


@pytest.mark.parametrize("case", range(2))
def test_a_killed_rank_is_no_difference(shared: TinyWorld, straight: Ran, case: int) -> None:
    """The exactness law with two ranks: one of them dies in the middle of an accumulation, three times in a row."""
    generator, name = random.Random(case), f"killed-ranks{case}"
    for _ in range(3):
        victim, micro = generator.randrange(2), generator.randrange(1, 9)
        options = LONG | {"output_dir": name, "resume_from_checkpoint": "latest"}
        ran, codes = run_ranks(shared, shared.job(**options), partial(killed, victim, micro))
        assert codes[victim] in (-signal.SIGKILL, 0)
        if codes[victim] == 0:
            break  # it had fewer micro-steps left
        assert codes[1 - victim] == ExitCode.OUTSIDE
        if victim == 1:
            last = ran.events[-1]
            assert (last["type"], last["data"]["code"], last["data"]["exit_code"]) == ("error", "rank_lost", 69)
    resumed = two(shared, name, resume_from_checkpoint="latest")
    assert resumed.metrics() == straight.metrics()
    parts = ("transformer", "transformer_ema")
    files = [f"{part}/diffusion_pytorch_model.safetensors" for part in parts]
    files += ["optimizer-rank0.safetensors", "rng-rank0.safetensors", "rng-rank1.safetensors"]
    for file in files:
        left, right = (ran.output / "checkpoint-6" / file for ran in (straight, resumed))
        assert left.read_bytes() == right.read_bytes(), file


def killed(victim: int, micro: int, rank: int, pid: int) -> Hook:
    """Just before the backward pass of that micro-step."""

    def kill(count: int, loss: torch.Tensor) -> torch.Tensor:
        if rank == victim and count == micro:
            os.kill(pid, signal.SIGKILL)
        return loss

    return kill


def test_what_another_rank_says_is_told(shared: TinyWorld) -> None:
    def hook(rank: int, _: int) -> Hook:
        def break_down(count: int, loss: torch.Tensor) -> torch.Tensor:
            if rank == 1 and count == 3:
                raise ZeroDivisionError("of rank 1")
            return loss

        return break_down

    ran, codes = run_ranks(shared, shared.job(output_dir="rank-bug", **LONG), hook)
    assert codes == [ExitCode.BUG, ExitCode.BUG]
    assert (ran.events[-1]["type"], ran.events[-1]["data"]["code"]) == ("error", "bug")
    assert "Rank 1: ZeroDivisionError: of rank 1" in ran.events[-1]["message"]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_number_that_is_none_on_one_rank_concerns_all(shared: TinyWorld, action: str) -> None:
    """Its step is skipped everywhere, the samples of every rank are named, and the ranks stay alike."""

    def hook(rank: int, _: int) -> Hook:
        return lambda count, loss: loss * float("nan") if rank == 1 and count == 3 else loss

    small = {"train_batch_size": 1, "gradient_accumulation_steps": 1}
    options = LONG | small | {"output_dir": f"rank-nan-{action}", "nonfinite_action": action}
    ran, codes = run_ranks(shared, shared.job(**options), hook)
    assert codes == [0, 0]
    (bad,) = ran.notices("nonfinite_step")
    assert len(bad["data"]["samples"]) == len(bad["data"]["captions"]) == len(bad["data"]["t"]) == 2
    assert bad["data"]["step"] == 3
    assert [row["step"] for row in ran.metrics()] == [1, 2, 3, 4, 5, 6]
    assert all(torch.isfinite(tensor).all() for tensor in ran.weights(6).values())
    assert bool(ran.notices("rolled_back")) == (action == "rollback")
    assert bool(ran.notices("sample_quarantined")) == (action == "rollback")


def test_requests_reach_every_rank(shared: TinyWorld) -> None:
    """A checkpoint and a stop that come in the middle of an accumulation act after that step, on both ranks."""
    job = shared.job(output_dir="rank-stop", **LONG | {"checkpoint_step_interval": 0})

    def hook(rank: int, _: int) -> Hook:
        def ask(count: int, loss: torch.Tensor) -> torch.Tensor:
            for micro, command in ((3, CommandName.CHECKPOINT), (7, CommandName.STOP)):
                if rank == 0 and count == micro:
                    job.send(Command(command=command, request_id=command.value))
            return loss

        return ask

    ran, codes = run_ranks(shared, job, hook)
    assert codes == [0, 0], "torchrun is not told of a failure"
    assert [event["checkpoint"]["label"] for event in ran.of_type("training.checkpoint")] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    end = ran.of_type("training.status")[-1]["data"]
    assert (end["status"], end["exit_code"]) == ("stopped", ExitCode.STOPPED)
    batch = json.loads((ran.output / "checkpoint-4/training_state.json").read_text())["batch_layout"]
    assert batch["num_processes"] == 2


def test_ranks_share_what_is_to_be_encoded(world: TinyWorld) -> None:
    job = world.job(**LONG | {"max_train_steps": 1})
    ran, codes = run_ranks(world, job)
    assert codes == [0, 0]
    pictures = len(list(world.pictures.iterdir()))
    counts = {notice["data"]["kind"]: notice["data"] for notice in ran.notices("cache_report")}
    assert (counts["latents"]["encoded"], counts["latents"]["reused"]) == (pictures, 0)
    assert counts["captions"]["encoded"] > 1 and counts["captions"]["reused"] == 0
    again, codes = run_ranks(world, world.job(**LONG | {"max_train_steps": 1, "output_dir": "again"}))
    assert codes == [0, 0] and {notice["data"]["encoded"] for notice in again.notices("cache_report")} == {0}
