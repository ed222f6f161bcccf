"""Weights that are spread over the ranks train to the same result, and are saved, resumed and exported alike."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_world import KONTEXT, paired_world
from rank_world import run_ranks
from safetensors.torch import load_file
from tiny_world import Hook, Ran, TinyWorld

from simpletuner.checkpoints import find_faults
from simpletuner.errors import ExitCode

TWO: dict[str, Any] = {
    "num_processes": 2,
    "train_batch_size": 1,
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "checkpoints_total_limit": 0,
}
SPREAD: dict[str, Any] = TWO | {"fsdp_enable": True}
BF16: dict[str, Any] = {"base_model_default_dtype": "bf16", "optimizer": "adamw_bf16"}
DRAWN: dict[str, Any] = {
    "validation_disable": False,
    "validation_prompt": "red",
    "validation_resolution": "64x64",
    "validation_step_interval": 2,
    "validation_num_inference_steps": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"model_type": "lora"},
    "average": {"use_ema": True, "gradient_checkpointing": False, "gradient_accumulation_steps": 2},
    "fetched once": {
        "gradient_checkpointing_keeps": "attention",
        "fsdp_reshard_after_forward": False,
        "fsdp_transformer_layer_cls_to_wrap": "BasicTransformerBlock",
    },
}
pytestmark = pytest.mark.slow


def together(world: TinyWorld, output: Path, **options: Any) -> Ran:
    ran, codes = run_ranks(world, world.job(output_dir=str(output), **options))
    assert not any(codes), ran.events[-1]
    return ran


def whole_files(ran: Ran) -> dict[str, Path]:
    """What other programs read, and the generators."""
    files = {str(path.relative_to(ran.output)): path for path in ran.output.rglob("*.safetensors")}
    return {name: path for name, path in files.items() if "parts" not in path.parts and "optimizer" not in name}


@pytest.mark.parametrize(
    "kind", ["full", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("lora", "average", "fetched once"))]
)
def test_spread_or_not_the_result_is_the_same(shared: TinyWorld, tmp_path: Path, kind: str) -> None:
    """In fp32, where sums are taken in another order the last bits differ."""
    options = KINDS[kind]
    plain_options = {name: value for name, value in options.items() if not name.startswith("fsdp")}
    plain = together(shared, tmp_path / "whole", **TWO | plain_options)
    spread = together(shared, tmp_path / "spread", **SPREAD | options)
    assert spread.losses() == pytest.approx(plain.losses(), rel=1e-5)
    norms = [[row["grad_norm"] for row in ran.metrics()] for ran in (plain, spread)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    files = whole_files(plain), whole_files(spread)
    assert files[0].keys() == files[1].keys()
    for name, path in files[0].items():
        one, other = load_file(path), load_file(files[1][name])
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            # The gradient of a key's bias is zero but for rounding, which Adam makes steps of.
            if not key.endswith("to_k.bias"):
                torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=2e-5, equal_nan=True)
    assert not find_faults(spread.output / "checkpoint-4")


@pytest.mark.parametrize(
    "kind", [{"use_ema": True}, pytest.param(BF16, marks=pytest.mark.long)], ids=["average", "rounded"]
)
def test_a_killed_rank_is_no_difference(shared: TinyWorld, tmp_path: Path, kind: dict[str, Any]) -> None:
    """Equal to the byte, and no file of a checkpoint has Python objects in it."""

    def hook(rank: int, pid: int) -> Hook:
        def kill(count: int, loss: torch.Tensor) -> torch.Tensor:
            if rank == 1 and count == 4:
                os.kill(pid, signal.SIGKILL)
            return loss

        return kill

    options = SPREAD | kind | {"max_train_steps": 6}
    straight = together(shared, tmp_path / "straight", **options)
    output = tmp_path / "killed"
    _, codes = run_ranks(shared, shared.job(output_dir=str(output), **options), hook)
    assert codes == [ExitCode.OUTSIDE, -signal.SIGKILL]
    resumed = together(shared, output, **options, resume_from_checkpoint="latest")
    assert resumed.metrics() == straight.metrics()
    ends = [ran.output / "checkpoint-6" for ran in (straight, resumed)]
    names = sorted(str(path.relative_to(ends[0])) for path in ends[0].rglob("*") if path.is_file())
    assert len([name for name in names if name.startswith("parts/")]) == 2
    assert {Path(name).suffix for name in names} == {".safetensors", ".json", ".md"}
    for name in names:
        if name.endswith(".safetensors"):
            # The header of a part has an order of its own each time.
            read = content_of if name.startswith("parts/") else Path.read_bytes
            one, other = (read(end / name) for end in ends)
            assert one == other, name


def content_of(path: Path) -> bytes:
    """Of a safetensors file, without its header. Not by torch: its threads do not outlive the forks to come."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.mark.long
def test_another_number_of_ranks_goes_on(shared: TinyWorld, tmp_path: Path) -> None:
    together(shared, tmp_path / "two", **SPREAD | {"use_ema": True})
    begun = tmp_path / "two"
    four = {"num_processes": 4, "max_train_steps": 5, "use_ema": True, "resume_from_checkpoint": "latest"}
    spread = together(shared, begun, **SPREAD | four)
    assert spread.notices("resume_not_exact")
    assert [row["step"] for row in spread.metrics()] == [1, 2, 3, 4, 5]
    options = {"num_processes": 4, "max_train_steps": 2}
    runs = [together(shared, tmp_path / str(on), **TWO | options, fsdp_enable=on) for on in (False, True)]
    assert runs[1].losses() == pytest.approx(runs[0].losses(), rel=1e-5)
    refused, codes = run_ranks(
        shared, shared.job(output_dir=str(begun), **TWO, use_ema=True, resume_from_checkpoint="latest")
    )
    assert codes[0] == ExitCode.CONFIG
    assert refused.events[-1]["data"]["pointer"] == "/--fsdp_enable"


@pytest.mark.long
def test_going_back_reaches_every_part(shared: TinyWorld, tmp_path: Path) -> None:
    def hook(rank: int, _: int) -> Hook:
        return lambda count, loss: loss * float("nan") if rank == 1 and count == 4 else loss

    options = SPREAD | {"nonfinite_action": "rollback", "use_ema": True, "max_train_steps": 6}
    ran, codes = run_ranks(shared, shared.job(output_dir=str(tmp_path / "back"), **options), hook)
    assert codes == [0, 0], ran.events[-1]
    assert ran.notices("rolled_back")
    assert [row["step"] for row in ran.metrics()] == [1, 2, 3, 4, 5, 6]
    assert all(torch.isfinite(tensor).all() for tensor in ran.weights(6).values())


def test_every_rank_helps_to_draw_and_to_measure(shared: TinyWorld, tmp_path: Path) -> None:
    """Pictures, of the average too, before, within and after the run; as without spreading, but for rounding."""
    world = TinyWorld(tmp_path, shared.model)
    world.entries.append({"id": "kept", "dataset_type": "eval", "instance_data_dir": "pictures2", "resolution": 64})
    (tmp_path / "pictures").rename(tmp_path / "pictures2")
    TinyWorld(tmp_path, shared.model)
    options = DRAWN | {"use_ema": True, "eval_steps_interval": 2, "eval_timesteps": 2, "disable_benchmark": False}
    runs = [together(world, tmp_path / name, **kind | options) for name, kind in (("one", TWO), ("other", SPREAD))]
    pictures = [sorted(path.name for path in (ran.output / "validation_images").rglob("*.png")) for ran in runs]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) >= 5
    losses = [[event["data"]["value"] for event in ran.of_type("training.metric")] for ran in runs]
    assert losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_class_that_is_no_block_of_the_model(shared: TinyWorld, tmp_path: Path) -> None:
    options = SPREAD | {"fsdp_transformer_layer_cls_to_wrap": "FluxTransformerBlock"}
    ran, codes = run_ranks(shared, shared.job(output_dir=str(tmp_path), **options))
    assert codes == [ExitCode.CONFIG, ExitCode.CONFIG]
    last = ran.events[-1]["data"]
    assert (last["code"], last["pointer"]) == ("unknown_block_class", "/--fsdp_transformer_layer_cls_to_wrap")
    assert "BasicTransformerBlock" in last["hint"]


@pytest.mark.long
def test_the_frozen_base_of_kontext_is_spread(tmp_path: Path) -> None:
    """A LyCORIS adapter over it, with references, drawn and exported."""
    world = paired_world(tmp_path)
    options = KONTEXT | DRAWN | {"lora_type": "lycoris", "max_train_steps": 2, "checkpoint_step_interval": 0}
    runs = [together(world, tmp_path / str(on), **TWO | options, fsdp_enable=on) for on in (False, True)]
    assert runs[1].losses() == pytest.approx(runs[0].losses(), rel=1e-4)
    for name, path in whole_files(runs[0]).items():
        one, other = load_file(path), load_file(whole_files(runs[1])[name])
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-2, atol=1e-4, equal_nan=True)
