"""Death and resumption. training.md §6.2, 6.3; acceptance 38, 40, 41, 43, 45."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_world import Ran, TinyWorld, paint_pictures

from simpletuner.checkpoints import MANIFEST, find_faults
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import CommandName

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {
    "max_train_steps": 7,
    "gradient_accumulation_steps": 3,
    "checkpoint_step_interval": 2,
    "checkpoints_total_limit": 0,
    "use_ema": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
}
PARTS = (
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer_ema/diffusion_pytorch_model.safetensors",
    "optimizer-rank0.safetensors",
    "rng-rank0.safetensors",
)


LIBRARY_OF = {"adamw_schedulefree": "schedulefree", "soap": "pytorch_optimizer"}


def same_end_of(one: Ran, other: Ran, step: int, parts: Sequence[str]) -> None:
    """Metrics and the named files of the last checkpoint."""
    assert one.metrics() == other.metrics()
    for part in (*parts, "optimizer-rank0.safetensors", "rng-rank0.safetensors"):
        left, right = (ran.output / f"checkpoint-{step}" / part for ran in (one, other))
        assert left.read_bytes() == right.read_bytes(), part


def same_end(one: Ran, other: Ran, step: int = 7) -> None:
    """Losses, rates, weights, optimizer, average, generators, place in the plan: bit for bit."""
    same_end_of(one, other, step, PARTS)
    states = [json.loads((ran.output / f"checkpoint-{step}/training_state.json").read_text()) for ran in (one, other)]
    assert states[0]["position"] == states[1]["position"] and states[0]["samples"] == states[1]["samples"]
    for name in ("transformer/diffusion_pytorch_model.safetensors", "model_index.json"):
        assert (one.output / "pipeline" / name).read_bytes() == (other.output / "pipeline" / name).read_bytes()


def checkpoints(ran: Ran) -> set[str]:
    return {path.name for path in ran.output.glob("checkpoint-*")}


@pytest.fixture(scope="module")
def straight(shared: TinyWorld) -> Ran:
    return shared.run(output_dir="straight", **LONG)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        ("torch-adamw", "fp32"),
        ("optimi-lion", "fp32"),
        ("adamw_bf16", "bf16"),
        ("adamw_schedulefree", "bf16"),
        ("soap", "bf16"),
        *(
            pytest.param(optimizer, dtype, marks=pytest.mark.long)
            for optimizer, dtype in (
                ("torch-adamw", "bf16"),
                ("optimi-lion", "bf16"),
                ("adamw_bf16", "fp32"),
                ("adamw_schedulefree", "fp32"),
                ("soap", "fp32"),
            )
        ),
    ],
)
def test_going_on_is_never_having_stopped(shared: TinyWorld, optimizer: str, dtype: str) -> None:
    if optimizer in LIBRARY_OF:
        pytest.importorskip(LIBRARY_OF[optimizer])
    options = LONG | {"optimizer": optimizer, "base_model_default_dtype": dtype}
    whole = shared.run(output_dir=f"whole-{optimizer}-{dtype}", **options)
    name = f"halves-{optimizer}-{dtype}"
    # A run of seven steps that was cut after four: what a cut leaves is its checkpoints.
    shared.run(output_dir=name, **options)
    output = shared.root / name
    for step in (6, 7):
        shutil.rmtree(output / f"checkpoint-{step}")
    resumed = shared.run(output_dir=name, **options)
    assert resumed.of_type("training.status")[0]["data"]["status"] == "resumed"
    assert resumed.of_type("training.status")[0]["data"]["resumed_from"] == "checkpoint-4"
    same_end(whole, resumed)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_a_schedule_the_average_is_what_others_read(shared: TinyWorld, dtype: str) -> None:
    """Checkpoint and pipeline hold x, the state what training goes on from: y and z."""
    pytest.importorskip("schedulefree")
    options = LONG | {"optimizer": "adamw_schedulefree", "base_model_default_dtype": dtype, "use_ema": False}
    ran = shared.run(output_dir=f"averaged-{dtype}", **options)
    state = load_file(ran.output / "checkpoint-7/optimizer-rank0.safetensors")
    y, z = state["weights.0" if dtype == "fp32" else "optimizer.0.weights"], state["optimizer.0.z"]
    x = (y + (1 - 1 / 0.9) * (z - y)).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    for folder in (ran.output / "checkpoint-7", ran.output / "pipeline"):
        saved = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
        kept = torch.cat([value.flatten() for value in saved.values()]).float().sort().values
        found = x[x != 0].float().sort().values
        assert torch.allclose(kept[kept != 0], found, atol=1e-6), folder
        assert not torch.allclose(kept[kept != 0], y[y != 0].float().sort().values, atol=1e-5)


def test_without_a_schedule_the_average_is_what_is_looked_at(world: TinyWorld) -> None:
    """An image and a held-out loss in the middle are those of a run that ended there, which are of its export."""
    pytest.importorskip("schedulefree")
    paint_pictures(world.root / "held", ((64, 64),))
    world.entries.append({"id": "held", "dataset_type": "eval", "instance_data_dir": "held", "resolution": 64})
    options = {
        "optimizer": "adamw_schedulefree", "learning_rate": 0.01, "validation_disable": False,
        "validation_prompt": "red", "validation_resolution": 64, "validation_num_inference_steps": 2,
        "validation_step_interval": 2, "disable_benchmark": True, "eval_timesteps": 3,
    }  # fmt: skip
    longer, ended = (world.run(output_dir=str(steps), max_train_steps=steps, **options) for steps in (4, 2))
    images = [ran.output / "validation_images/step_2_validation_0_64x64.png" for ran in (longer, ended)]
    assert images[0].read_bytes() == images[1].read_bytes()
    exported = world.run(
        output_dir="onward",
        max_train_steps=1,
        **options | {"pretrained_model_name_or_path": f"{ended.output}/pipeline"},
    )
    losses = [
        {event["data"]["step"]: event["data"]["value"] for event in ran.of_type("training.metric")}
        for ran in (longer, ended, exported)
    ]
    assert losses[0][2] == losses[1][2] == losses[2][0] != losses[0][4]


@pytest.mark.long
@pytest.mark.parametrize("case", [0, 1])
def test_three_deaths_in_a_row_are_no_difference(shared: TinyWorld, straight: Ran, case: int) -> None:
    """The exactness law: kill −9 in the middle of accumulation, three times, at seeded random micro-steps."""
    generator = random.Random(case)
    name = f"killed{case}"
    deaths: list[int] = []
    for _ in range(3):
        # Counted from where this process starts; the first checkpoint is made after six micro-steps.
        deaths.append(generator.randrange(1, 9))
        before = (
            "import os, signal, torch\n"
            f"left = [{deaths[-1]}]\n"
            "plain = torch.Tensor.backward\n"
            "def backward(*args, **keys):\n"
            "    plain(*args, **keys)\n"
            "    left[0] -= type(args[0]).__name__ != 'FakeTensor'\n"
            "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
            "torch.Tensor.backward = backward\n"
        )
        assert shared.spawn(shared.job(output_dir=name, **LONG), before=before).code == -9
    last = shared.spawn(shared.job(output_dir=name, **LONG))
    assert last.code == 0, (deaths, last.events[-1])
    same_end(straight, last)


def test_stop_saves_and_the_next_start_goes_on(shared: TinyWorld, straight: Ran) -> None:
    stopped = shared.run_until(2, CommandName.STOP, output_dir="stopped", **LONG | {"checkpoint_step_interval": 0})
    assert stopped.code is ExitCode.STOPPED
    status = stopped.of_type("training.status")[-1]["data"]
    assert (status["status"], status["global_step"], status["total_num_steps"]) == ("stopped", 2, 7)
    assert checkpoints(stopped) == {"checkpoint-2"} and not (stopped.output / "pipeline").exists()
    resumed = shared.run(output_dir="stopped", **LONG)
    same_end(straight, resumed)


def test_cancel_saves_nothing(shared: TinyWorld) -> None:
    ran = shared.run_until(3, CommandName.CANCEL, output_dir="cancelled", **LONG | {"checkpoint_step_interval": 3})
    assert ran.code is ExitCode.STOPPED
    assert ran.of_type("training.status")[-1]["data"]["status"] == "cancelled"
    assert checkpoints(ran) == set()


def test_a_finished_run_is_only_exported(shared: TinyWorld, straight: Ran) -> None:
    shutil.copytree(straight.output, shared.root / "finished")
    shutil.rmtree(shared.root / "finished/pipeline")
    ran = shared.run(output_dir="finished", **LONG)
    assert ran.code is ExitCode.DONE
    same_end(straight, ran)
    assert ran.of_type("training.checkpoint") == []


def copy_of(straight: Ran, shared: TinyWorld, name: str) -> Path:
    return Path(shutil.copytree(straight.output, shared.root / name))


def test_a_broken_newer_one_is_skipped_by_name(shared: TinyWorld, straight: Ran) -> None:
    output = copy_of(straight, shared, "flipped")
    shutil.rmtree(output / "checkpoint-7")
    file = output / "checkpoint-6/optimizer-rank0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    (output / "checkpoint-old").mkdir()
    ran = shared.run(output_dir="flipped", **LONG)
    notice = ran.notices("checkpoint_broken")
    assert len(notice) == 1 and "checkpoint-6" in notice[0]["message"] and "optimizer-rank0" in notice[0]["message"]
    assert ran.of_type("training.status")[0]["data"]["resumed_from"] == "checkpoint-4"
    assert (output / "checkpoint-old").exists()
    same_end(straight, ran)
    assert find_faults(output / "checkpoint-6") == []


@pytest.mark.parametrize("name", ["checkpoint-5", "checkpoint-6", "elsewhere/checkpoint-6", "checkpoint-old"])
def test_an_explicit_name_that_is_not_whole(shared: TinyWorld, straight: Ran, name: str) -> None:
    output = shared.root / "explicit"
    if not output.exists():
        copy_of(straight, shared, "explicit")
        (output / "checkpoint-6" / MANIFEST).unlink()
        (output / "checkpoint-old").mkdir()
    with pytest.raises(UserError) as caught:
        shared.run(output_dir="explicit", resume_from_checkpoint=name, **LONG)
    assert (caught.value.code, caught.value.exit_code) == ("checkpoint_not_found", ExitCode.CONFIG)
    assert "checkpoint-7" in caught.value.hint and "checkpoint-6," not in caught.value.hint


@pytest.mark.parametrize("absolute", [True, False])
def test_going_back_to_an_explicit_one(shared: TinyWorld, straight: Ran, absolute: bool) -> None:
    name = f"back{absolute}"
    output = copy_of(straight, shared, name)
    written = str(output / "checkpoint-2") if absolute else "checkpoint-2"
    ran = shared.run(output_dir=name, resume_from_checkpoint=written, **LONG | {"checkpoints_total_limit": 1})
    assert ran.of_type("training.status")[0]["data"]["resumed_from"] == "checkpoint-2"
    same_end(straight, ran)


def test_going_back_keeps_what_was_just_saved(shared: TinyWorld, straight: Ran) -> None:
    """With newer ones of the abandoned branch beside it, and a limit of one."""
    copy_of(straight, shared, "rewound")
    options = LONG | {"checkpoints_total_limit": 1, "checkpoint_step_interval": 0, "learning_rate": 2e-3}
    ran = shared.run_until(1, CommandName.STOP, output_dir="rewound", resume_from_checkpoint="checkpoint-2", **options)
    assert "checkpoint-3" in checkpoints(ran)
    assert [row["step"] for row in ran.metrics()] == [1, 2, 3]


def test_empty_starts_afresh(shared: TinyWorld, straight: Ran) -> None:
    copy_of(straight, shared, "afresh")
    ran = shared.run(output_dir="afresh", resume_from_checkpoint="", **LONG)
    assert ran.of_type("training.status")[0]["data"]["status"] == "running"
    same_end(straight, ran)
    first = shared.run(output_dir="nothing-yet", max_train_steps=1)
    assert len(first.notices("fresh_start")) == 1


def test_another_batch_goes_on_at_the_same_sample(shared: TinyWorld, straight: Ran) -> None:
    copy_of(straight, shared, "rebatched")
    shutil.rmtree(shared.root / "rebatched/checkpoint-7")
    options = LONG | {"train_batch_size": 4, "gradient_accumulation_steps": 1}
    ran = shared.run(output_dir="rebatched", **options)
    notice = ran.notices("resume_not_exact")
    assert len(notice) == 1 and notice[0]["data"]["changed"] == ["batch_layout"]
    kept = [json.loads((ran.output / f"checkpoint-{step}/training_state.json").read_text()) for step in (6, 7)]
    assert [state["samples"] for state in kept] == [36, 40]
    # 24 pictures an epoch: sample 36 is the middle of the second one, however it is cut.
    assert (kept[0]["position"], kept[1]["position"]["epoch"]) == ({"epoch": 1, "index": 6}, 1)
    assert kept[1]["position"]["index"] == 4


def test_another_accumulation_keeps_the_place_exactly(shared: TinyWorld, straight: Ran) -> None:
    copy_of(straight, shared, "accumulated")
    shutil.rmtree(shared.root / "accumulated/checkpoint-7")
    ran = shared.run(output_dir="accumulated", **LONG | {"gradient_accumulation_steps": 1})
    assert json.loads((ran.output / "checkpoint-7/training_state.json").read_text())["position"] == {
        "epoch": 1,
        "index": 7,
    }


@pytest.mark.parametrize(
    ("change", "code"),
    [({"optimizer": "optimi-lion"}, "resume_incompatible"), ({"use_ema": False}, "resume_incompatible")],
)
def test_what_cannot_go_on(shared: TinyWorld, straight: Ran, change: dict[str, Any], code: str) -> None:
    with pytest.raises(UserError) as caught:
        shared.run(output_dir="straight", **LONG | {"max_train_steps": 9} | change)
    assert (caught.value.code, caught.value.exit_code) == (code, ExitCode.CONFIG)


def test_other_weights_of_the_same_names_cannot_go_on(shared: TinyWorld, straight: Ran) -> None:
    with pytest.raises(UserError) as caught:
        shared.run(output_dir="straight", **LONG | {"max_train_steps": 9, "base_model_default_dtype": "bf16"})
    assert caught.value.code == "resume_incompatible"


def test_changed_data_needs_a_word(world: TinyWorld) -> None:
    world.run(max_train_steps=2)
    (world.pictures / "red_64x64.png").unlink()
    with pytest.raises(UserError) as caught:
        world.run(max_train_steps=4)
    assert caught.value.code == "dataset_changed"
    ran = world.run(max_train_steps=4, override_dataset_config=True)
    assert ran.notices("resume_not_exact")[0]["data"]["changed"] == ["data"]
    assert [row["step"] for row in ran.metrics()] == [1, 2, 3, 4]


def test_a_changed_rate_is_free(shared: TinyWorld, straight: Ran) -> None:
    copy_of(straight, shared, "rated")
    shutil.rmtree(shared.root / "rated/checkpoint-7")
    ran = shared.run(output_dir="rated", **LONG | {"learning_rate": 1e-5})
    assert ran.notices("resume_not_exact") == []
    assert ran.metrics()[-1]["learning_rate"] < straight.metrics()[-2]["learning_rate"]


def test_retention_while_running(shared: TinyWorld) -> None:
    ran = shared.run(output_dir="kept", **LONG | {"checkpoints_total_limit": 2, "checkpoint_step_interval": 1})
    assert checkpoints(ran) == {"checkpoint-6", "checkpoint-7"}


def test_no_pickle_in_any_file(straight: Ran) -> None:
    """Acceptance 43: every file is safetensors or text."""
    files = [path for path in straight.output.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert list(tensors.keys()), path
        else:
            assert path.suffix in (".json", ".jsonl", ".md") and path.read_text(encoding="utf-8"), path


def test_temporary_folders_go_at_the_next_start(shared: TinyWorld, straight: Ran) -> None:
    output = copy_of(straight, shared, "leftover")
    shutil.rmtree(output / "checkpoint-7")
    (output / ".checkpoint-7-tmp/transformer").mkdir(parents=True)
    (output / ".checkpoint-9-tmp").mkdir()
    same_end(straight, shared.run(output_dir="leftover", **LONG))
    assert not list(output.glob(".checkpoint*"))


def test_a_stop_by_signal(shared: TinyWorld, straight: Ran) -> None:
    """SIGTERM in the loop: the step is finished, saved, 75."""

    def terminate(count: int, loss: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    ran = shared.main(shared.job(output_dir="signalled", **LONG), terminate)
    assert (ran.code, checkpoints(ran)) == (75, {"checkpoint-1"})
    resumed = shared.run(output_dir="signalled", **LONG)
    same_end(straight, resumed)


def test_a_full_cache_changes_nothing(world: TinyWorld) -> None:
    """Generators stand alike whether encoders were loaded or not."""
    cold, warm = (world.run(output_dir=name, **LONG) for name in ("cold", "warm"))
    assert warm.notices("cache_report")[0]["data"]["encoded"] == 0 < cold.notices("cache_report")[0]["data"]["encoded"]
    same_end(cold, warm)


def test_a_job_that_is_launched_again_goes_on_whatever_it_was_told(world: TinyWorld) -> None:
    """A pause, a lost worker: from its own checkpoint, not from one that an earlier job left in the folder."""
    older = world.run(max_train_steps=6, checkpoint_step_interval=0)
    assert older.code == 0
    options = {"max_train_steps": 9, "resume_from_checkpoint": "", "checkpoint_step_interval": 4}
    job = world.job(**options)
    job.write_spec(job.read_spec().model_copy(update={"continues": True}))
    fresh = world.main(job)
    assert fresh.code == 0 and fresh.of_type("training.status")[0]["data"]["status"] == "running"
    (fresh.output / "checkpoint-9" / "checkpoint_manifest.json").unlink()
    again = world.main(job)
    statuses = [event["data"] for event in again.of_type("training.status") if event["data"]["status"] == "resumed"]
    assert [status["resumed_from"] for status in statuses] == ["checkpoint-8"]
