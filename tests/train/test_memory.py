"""The memory that is predicted is the memory that is used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from flux_world import KONTEXT, paired_world
from tiny_world import TinyWorld
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simpletuner.config.train_config import TrainConfig
from simpletuner.errors import ExitCode, UserError
from simpletuner.families.base import build_family
from simpletuner.families.precision import plain_tensors
from simpletuner.families.registry import load_spec
from simpletuner.train.buffer import build_buffers
from simpletuner.train.ema import Ema
from simpletuner.train.memory import MemoryPlan
from simpletuner.train.meter import Meter, rehearsal
from simpletuner.train.optim import build_optimizers
from simpletuner.train.rehearsal import Rehearsal, Shapes, rehearse
from simpletuner.train.trained import prepare_denoiser

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TOLERANCE = 0.08


def test_a_meter_counts_what_is_alive() -> None:
    with rehearsal() as meter:
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1
        view = second[10:]
        assert meter.live_bytes == 8000
        del first
        assert meter.live_bytes == 4000
        del second
        assert meter.live_bytes == 4000, "the view holds the storage"
        assert meter.peak_bytes == 8000
        meter.restart()
        view.mul_(2)
        assert meter.peak_bytes == 4000


def test_backward_is_counted_with_what_it_keeps() -> None:
    with rehearsal() as meter:
        layers = nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(4)])
        weights = 4 * 100 * 100 * 4
        assert meter.live_bytes == weights
        layers(torch.zeros(50, 100)).sum().backward()
        assert meter.live_bytes == 2 * weights, "gradients stay"
        assert meter.peak_bytes > 2 * weights


def test_a_rehearsal_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    with rehearsal():
        nn.Linear(8, 8)
        torch.randn(8)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return paired_world(tmp_path_factory.mktemp("pairs"))


PIXART = Shapes(encoded=(2, (64, 64)), trained=(64, 64), references=())
FLUX = Shapes(encoded=(2, (64, 64)), trained=(64, 64), references=((64, 64),))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": False},
        {"use_ema": True},
        {"train_batch_size": 3},
        {"base_model_precision": "fp32", "mixed_precision": "no", "optimizer": "torch-adamw"},
        {"model_type": "lora"},
        {"model_type": "lora", "gradient_checkpointing": False},
    ],
    ids=str,
)
def test_a_pixart_step_takes_what_was_predicted(shared: TinyWorld, options: dict[str, Any]) -> None:
    compare(shared.resolve(**options).require(), PIXART)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "lora"},
        {"model_type": "lora", "lora_type": "lycoris"},
        {"model_type": "lora", "gradient_checkpointing": False},
        {"model_type": "lora", "base_model_precision": "int8-quanto"},
        {"model_type": "lora", "base_model_precision": "int8-torchao", "gradient_checkpointing": False},
    ],
    ids=str,
)
def test_a_kontext_step_takes_what_was_predicted(pairs: TinyWorld, options: dict[str, Any]) -> None:
    compare(pairs.resolve(**KONTEXT | options).require(), FLUX)


def compare(config: TrainConfig, shapes: Shapes) -> None:
    """The prediction for the step against the same step on real tensors, with the real base."""
    spec = load_spec(config.model.model_family)
    predicted = rehearse(config, spec, shapes, CPU).phases["step"]
    real = Rehearsal(config, spec, shapes)
    real._family = build_family(config, spec)
    real._channels = real._family.load_autoencoder(CPU).config["latent_channels"]
    denoiser = real._family.load_denoiser()
    prepare_denoiser(denoiser, config, spec)
    buffers = build_buffers(denoiser)
    kept = [tensor for one in build_optimizers(config.optimizer.optimizer, buffers, 0) for tensor in one.state.values()]
    if config.precision.use_ema:
        kept += Ema(buffers, config.precision.ema_decay).shadows
    kept += [buffer.grads for buffer in buffers]
    kept += [part for parameter in denoiser.parameters() for part in plain_tensors(parameter)]
    meter = Meter(FakeTensorMode())
    with meter:
        for tensor in kept:
            tensor.detach()  # an operation, so that its storage is seen
        real._micro_step(denoiser)
    assert predicted == pytest.approx(meter.peak_bytes, rel=TOLERANCE)


def test_an_optimizer_of_a_library_counts_with_its_state(shared: TinyWorld) -> None:
    found = {
        name: rehearse(shared.resolve(optimizer=name).require(), load_spec("pixart_sigma"), PIXART, CPU).phases["step"]
        for name in ("torch-sgd", "torch-adam", "optimi-lion")
    }
    weights = sum(
        p.numel()
        for p in build_family(shared.resolve().require(), load_spec("pixart_sigma")).load_denoiser().parameters()
    )
    assert found["torch-adam"] - found["torch-sgd"] == pytest.approx(8 * weights, rel=0.05)
    assert found["optimi-lion"] - found["torch-sgd"] == pytest.approx(4 * weights, rel=0.05)


def test_what_has_no_room_is_refused_before_it_is_loaded(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10_000_000, available=10_000_000))
    ran = world.main(world.job(max_train_steps=1))
    assert ran.code == ExitCode.OUT_OF_MEMORY
    last = ran.events[-1]
    assert last["data"]["code"] == "will_not_fit"
    assert "'step' needs" in last["message"] and "--gradient_checkpointing" in last["data"]["hint"]
    assert not [event for event in ran.events if event.get("stage", {}).get("key") == "init_text_embed_cache"]
    assert world.run(max_train_steps=1, i_know_what_i_am_doing=True).code == ExitCode.DONE


def test_a_run_says_what_it_will_need_and_what_it_needed(world: TinyWorld) -> None:
    ran = world.run(max_train_steps=1)
    (plan,) = [event["data"] for event in ran.notices("memory_plan")]
    (summary,) = [event["data"] for event in ran.of_type("training.summary")]
    assert set(plan["phases"]) == {"text", "latents", "step", "validation", "save"}
    assert plan["predicted_bytes"] == max(plan["phases"][phase] for phase in ("text", "latents", "step", "save"))
    assert summary["memory_predicted_bytes"] == plan["predicted_bytes"] > plan["held_bytes"] > 0


def test_phases_that_are_not_entered_do_not_count() -> None:
    plan = MemoryPlan({"text": 9, "latents": 1, "step": 5, "validation": 4, "save": 3}, torch.device("cuda"), 100, 6)
    plan.enter("step", "save")
    assert plan.predicted_bytes() == 5
    with pytest.raises(UserError, match="'text' needs"):
        plan.enter("text")
