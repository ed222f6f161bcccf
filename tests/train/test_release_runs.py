"""Real runs with `optimizer_release_gradients`. training.md §2.3, §6.2, §10.4."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from flux_world import KONTEXT, paired_world
from rank_world import run_ranks
from tiny_world import Hook, Ran, TinyWorld
from torch._subclasses.fake_tensor import FakeTensorMode

from simpletuner.config.train_config import TrainConfig
from simpletuner.errors import ExitCode
from simpletuner.families.base import build_family
from simpletuner.families.precision import plain_tensors
from simpletuner.families.registry import load_spec
from simpletuner.train.backward_update import BackwardUpdate
from simpletuner.train.buffer import build_buffers
from simpletuner.train.fit import Fitting
from simpletuner.train.meter import Meter
from simpletuner.train.optim import build_optimizers
from simpletuner.train.rehearsal import Rehearsal, Shapes, rehearse
from simpletuner.train.trained import prepare_denoiser

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LONG: dict[str, Any] = {
    "max_train_steps": 6,
    "max_grad_norm": 0,
    "use_ema": True,
    "checkpoint_step_interval": 2,
    "checkpoints_total_limit": 0,
}
RELEASED = LONG | {"optimizer_release_gradients": True}
SHAPES = Shapes(encoded=(2, (64, 64)), trained=(64, 64), references=())


def same_end(one: Ran, other: Ran) -> None:
    """Every file of weights and state of the last checkpoint, byte for byte; losses. Norms add up in another order."""
    ends = [ran.output / "checkpoint-6" for ran in (one, other)]
    files = sorted(path.relative_to(ends[0]) for path in ends[0].rglob("*.safetensors"))
    assert len(files) >= 3
    assert files == sorted(path.relative_to(ends[1]) for path in ends[1].rglob("*.safetensors"))
    for file in files:
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), file
    rows = list(zip(one.metrics(), other.metrics(), strict=True))
    assert [left["loss"] for left, _ in rows] == [right["loss"] for _, right in rows]
    assert [left["grad_norm"] for left, _ in rows] == pytest.approx([right["grad_norm"] for _, right in rows], rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        ("adamw_bf16", "bf16"),
        ("torch-adamw", "fp32"),
        pytest.param("optimi-lion", "bf16", marks=pytest.mark.long),
        pytest.param("optimi-lion", "fp32", marks=pytest.mark.long),
    ],
)
def test_checkpoints_are_those_of_other_runs_and_go_on_in_them(shared: TinyWorld, optimizer: str, dtype: str) -> None:
    """A run of all gradients, one of none that are kept, and one that changes from the one to the other."""
    kind: dict[str, Any] = {"optimizer": optimizer, "base_model_default_dtype": dtype}
    name = f"{optimizer}-{dtype}"
    whole = shared.run(output_dir=f"all-{name}", **LONG | kind)
    released = shared.run(output_dir=f"released-{name}", **RELEASED | kind)
    same_end(whole, released)
    for before, after in ((LONG, RELEASED), (RELEASED, RELEASED)):
        place = f"changed-{name}-{'released' in before}"
        ran = shared.run(output_dir=place, **before | kind)
        for step in (4, 6):
            shutil.rmtree(ran.output / f"checkpoint-{step}")
        resumed = shared.run(output_dir=place, **after | kind, resume_from_checkpoint="latest")
        assert resumed.of_type("training.status")[0]["data"]["resumed_from"] == "checkpoint-2"
        same_end(whole, resumed)
        shutil.rmtree(ran.output)


@pytest.mark.long
def test_an_adapters_run_is_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = paired_world(tmp_path_factory.mktemp("pairs"))
    adapter = KONTEXT | {"model_type": "lora"}
    ends = [
        world.run(output_dir=name, **adapter | options | {"use_ema": False})
        for name, options in (("all", LONG), ("released", RELEASED))
    ]
    assert all(ran.code is ExitCode.DONE for ran in ends)
    same_end(ends[0], ends[1])


def test_two_ranks_add_up_each_gradient(shared: TinyWorld) -> None:
    """To the bit what they are with all gradients added up at the end."""
    ends: list[Ran] = []
    for name, options in (("ranks-all", LONG), ("ranks-released", RELEASED)):
        job = shared.job(output_dir=name, **options, num_processes=2, train_batch_size=1)
        ran, codes = run_ranks(shared, job)
        assert codes == [0, 0]
        ends.append(ran)
    same_end(ends[0], ends[1])


def test_a_loss_that_is_no_number_is_seen(shared: TinyWorld) -> None:
    job = shared.job(output_dir="released-nan", **RELEASED)
    hook: Hook = lambda count, loss: loss * float("nan") if count == 3 else loss  # noqa: E731
    ran = shared.main(job, hook)
    (bad,) = ran.notices("nonfinite_step")
    assert bad["data"]["step"] == 3
    assert "left weights as they were" in bad["message"]
    assert ran.code is ExitCode.DONE and all(torch.isfinite(value).all() for value in ran.weights(6).values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": False},
        {"optimizer": "adamw_bf16", "base_model_default_dtype": "bf16"},
        {"optimizer": "optimi-lion", "base_model_default_dtype": "bf16"},
    ],
    ids=str,
)
def test_a_step_takes_what_was_predicted(shared: TinyWorld, options: dict[str, Any]) -> None:
    """And less than with all gradients by about their bytes."""
    config = shared.resolve(**RELEASED | options).require()
    predicted = planned(config)
    assert predicted == pytest.approx(measured(config), rel=0.08)
    kept = planned(shared.resolve(**LONG | options).require())
    buffers = build_buffers(build_family(config, load_spec("pixart_sigma")).load_denoiser())
    gradients = sum(buffer.grads.nbytes for buffer in buffers)
    assert 0.8 * gradients < kept - predicted <= gradients


def planned(config: TrainConfig) -> int:
    return rehearse(config, load_spec("pixart_sigma"), SHAPES, CPU).phases["step"]


def measured(config: TrainConfig) -> int:
    """Bytes of real tensors at the peak of a micro-step."""
    spec = load_spec("pixart_sigma")
    real = Rehearsal(config, spec, SHAPES)
    real._family = build_family(config, spec)
    real._channels = real._family.load_autoencoder(CPU).config["latent_channels"]
    denoiser = real._family.load_denoiser()
    prepare_denoiser(denoiser, config, spec)
    buffers = build_buffers(denoiser, gradients=False)
    optimizers = build_optimizers(config.optimizer.optimizer, buffers, 0)
    update = BackwardUpdate(denoiser, buffers, optimizers, config.optimizer, 1, None)
    average = [buffer.weights.float().clone() for buffer in buffers]
    held = [*update.state_tensors().values(), *average]
    held += [part for parameter in denoiser.parameters() for part in plain_tensors(parameter)]
    meter = Meter(FakeTensorMode())
    with meter:
        for tensor in held:
            tensor.detach()  # an operation, so that its storage is seen
        update.begin(0)
        real._micro_step(denoiser)
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    return meter.peak_bytes


@pytest.mark.long
def test_a_smaller_batch_that_is_accumulated_is_not_proposed(shared: TinyWorld) -> None:
    spec = load_spec("pixart_sigma")
    for released in (False, True):
        config = shared.resolve(**LONG | {"optimizer_release_gradients": released, "train_batch_size": 4}).require()
        phases = rehearse(config, spec, SHAPES, CPU).phases
        fitting = Fitting(
            config, spec, lambda _: SHAPES, CPU, as_it_is=phases, budget_bytes=phases["step"] // 2, held_bytes=0
        )
        proposed = fitting.find().settings
        assert ("gradient_accumulation_steps" in proposed) is not released
