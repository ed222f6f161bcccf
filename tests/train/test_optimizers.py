"""Buffers, clipping, optimizers, moving average, learning rate. training.md §5; acceptance 30, 31."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simpletuner.bench.counters import LaunchCounter
from simpletuner.bench.launches import GraphCalls, figures
from simpletuner.config import rules
from simpletuner.config.training_options import OptimizerOptions
from simpletuner.data.keys import key_seed
from simpletuner.errors import UserError
from simpletuner.train.adamw import ADAMW_BF16, rounded_adamw
from simpletuner.train.buffer import FlatParameters, build_buffers, clip_gradients
from simpletuner.train.elementwise import ElementwiseOptimizer
from simpletuner.train.ema import Ema
from simpletuner.train.optim import OPTIMIZERS, Optimizer
from simpletuner.train.optim import build_optimizers as build_any_optimizers
from simpletuner.train.rounding import first_counters, store_rounded
from simpletuner.train.schedule import learning_rate
from simpletuner.train.update import Update

BF16, FP32 = torch.bfloat16, torch.float32
ROUNDED = rounded_adamw(ADAMW_BF16)
ON_CPU = sorted(name for name in OPTIMIZERS if not name.endswith("-paged"))
EXTRAS = {
    "bnb": "bitsandbytes", "prodigy": "prodigyopt", "adamw_schedulefree": "schedulefree", "soap": "pytorch_optimizer",
}  # fmt: skip
"""Libraries that an installation may do without."""


@pytest.fixture(autouse=True)
def compiles_anew() -> None:
    """Torch compiles one function so often in a process and no more; each test asks it to."""
    torch.compiler.reset()


def build_optimizers(name: str, buffers: list[FlatParameters], seed: int) -> list[Optimizer]:
    if (extra := EXTRAS.get(name.split("-")[0])) is not None:
        pytest.importorskip(extra)
    return build_any_optimizers(name, buffers, seed)


def buffer_of(values: Tensor) -> FlatParameters:
    return FlatParameters([("w", nn.Parameter(values.clone()))])


def net(dtype: torch.dtype = FP32) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    return module.to(dtype)


def wide_net(dtype: torch.dtype = FP32) -> nn.Module:
    """With a tensor that is large enough for state in blocks, and one of four dimensions."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(5), nn.Conv2d(3, 2, 2)).to(dtype)


def bits(value: Tensor) -> Tensor:
    """Of any type: `equal` knows none of eight bits."""
    return value.reshape(-1).view(torch.uint8)


def give_gradients(module: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        assert parameter.grad is not None
        parameter.grad.copy_(scale * torch.randn(parameter.shape, generator=generator))


# --- buffers


def test_parameters_and_gradients_are_views_and_stay_so() -> None:
    module, twin = net(), net()
    buffer = build_buffers(module)[0]
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    for own in (module, twin):
        own(x).square().mean().backward()
    for (name, parameter), (_, other), (slot_name, grads) in zip(
        module.named_parameters(), twin.named_parameters(), buffer.named_views(buffer.grads), strict=True
    ):
        assert name == slot_name
        assert torch.equal(parameter, other) and torch.equal(grads, other.grad)
        assert parameter.grad is not None and parameter.grad.data_ptr() == grads.data_ptr()
    buffer.grads.zero_()
    module(x).square().mean().backward()
    assert buffer.grads.any(), "a second backward still lands in the buffer"
    module.load_state_dict({name: torch.full_like(value, 2.0) for name, value in module.state_dict().items()})
    assert all((view == 2).all() for _, view in buffer.named_views(buffer.weights))
    buffer.weights.fill_(3)
    assert all((value == 3).all() for value in module.state_dict().values())


def test_a_buffer_for_each_dtype_and_padding_stays_zero() -> None:
    module = nn.ModuleList([nn.Linear(3, 3).to(BF16), nn.Linear(3, 3), nn.Linear(3, 3, bias=False).to(BF16)])
    module[1].bias.requires_grad_(False)
    buffers = build_buffers(module)
    assert [buffer.weights.dtype for buffer in buffers] == [BF16, FP32]
    assert [slot.name for slot in buffers[1].slots] == ["1.weight"]
    optimizers = build_optimizers("adamw_bf16", buffers, 1)
    for step in range(3):
        for buffer in buffers:
            for _, view in buffer.named_views(buffer.grads):
                view.fill_(1.0)
        clipping = clip_gradients(buffers, 1.0, "norm")
        for optimizer in optimizers:
            optimizer.step(0.1, step, clipping)
    for buffer in buffers:
        inside = torch.zeros_like(buffer.weights, dtype=torch.bool)
        for _, view in buffer.named_views(inside):
            view.fill_(True)
        assert not buffer.weights[~inside].any()


def test_the_layout_names_everything() -> None:
    base = [("a", nn.Parameter(torch.zeros(2, 3))), ("b", nn.Parameter(torch.zeros(4)))]
    layouts = {
        FlatParameters([(name, nn.Parameter(p.data.to(dtype).reshape(shape))) for name, p, shape in rows]).layout
        for dtype in (FP32, BF16)
        for rows in (
            [(n, p, p.shape) for n, p in base],
            [(n + "x", p, p.shape) for n, p in base],
            [(n, p, tuple(reversed(p.shape))) for n, p in base],
        )
    }
    assert len(layouts) == 6


# --- clipping


@pytest.mark.parametrize("scale", [1e-4, 0.3, 1e3])
@pytest.mark.parametrize("dtypes", [(FP32,), (FP32, BF16)])
def test_the_norm_after_clipping(scale: float, dtypes: tuple[torch.dtype, ...]) -> None:
    """min(norm, c), over all buffers together."""
    buffers = [build_buffers(net(dtype))[0] for dtype in dtypes]
    for index, buffer in enumerate(buffers):
        buffer.grads.copy_(scale * torch.randn(buffer.grads.shape, generator=torch.Generator().manual_seed(index)))
    norm = math.sqrt(sum(float(buffer.grads.double().square().sum()) for buffer in buffers))
    clipping = clip_gradients(buffers, 1.0, "norm")
    assert clipping.norm.item() == pytest.approx(norm, rel=1e-5)
    assert clipping.norm.item() * clipping.scale.item() == pytest.approx(min(norm, 1.0), rel=1e-5)
    assert clip_gradients(buffers, 0.0, "norm").scale.item() == 1


def test_clipping_by_value_reports_the_norm_before() -> None:
    buffer = buffer_of(torch.zeros(2))
    buffer.grads[:2] = torch.tensor([3.0, -4.0])
    clipping = clip_gradients([buffer], 0.5, "value")
    assert (clipping.norm.item(), clipping.scale.item()) == (5.0, 1.0)
    assert buffer.grads[:2].tolist() == [0.5, -0.5]


def test_a_zero_gradient_is_no_division() -> None:
    clipping = clip_gradients([buffer_of(torch.ones(3))], 1.0, "norm")
    assert (clipping.norm.item(), clipping.scale.item(), bool(clipping.finite)) == (0.0, 1.0, True)


# --- optimizers


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("method", ["norm", "value"])
def test_a_gradient_that_is_no_number_changes_nothing(name: str, dtype: torch.dtype, bad: float, method: str) -> None:
    module = net(dtype)
    buffers = build_buffers(module)
    options = OptimizerOptions(max_grad_norm=1.0, grad_clip_method=method)  # pyright: ignore[reportArgumentType]
    update = Update(buffers, build_optimizers(name, buffers, 3), options, 10, None)
    give_gradients(module)
    update.apply(0)
    kept = [buffer.weights.clone() for buffer in buffers]
    state = {key: value.clone() for key, value in update.state_tensors().items()}
    give_gradients(module, 1)
    buffers[0].grads[5] = bad
    update.apply(1)
    for before, buffer in zip(kept, buffers, strict=True):
        assert before.view(torch.uint8).equal(buffer.weights.view(torch.uint8))
        assert not buffer.grads.any(), "the next step starts from nothing"
    for key, value in update.state_tensors().items():
        assert torch.equal(state[key], value), key
    give_gradients(module, 2)
    update.apply(2)
    assert not torch.equal(kept[0], buffers[0].weights) and buffers[0].weights.isfinite().all()


@pytest.mark.parametrize(("name", "epsilon"), [("torch-adamw", 1e-8), ("adamw_bf16", 1e-6)])
@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_fused_adamw_is_torch_adamw(name: str, epsilon: float, limit: float) -> None:
    module, twin = net(), net()
    buffers = build_buffers(module)
    options = OptimizerOptions(learning_rate=1e-2, lr_scheduler="constant", max_grad_norm=limit)
    update = Update(buffers, build_optimizers(name, buffers, 1), options, 30, None)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=epsilon, weight_decay=0.01)
    for parameter in twin.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(30):
        give_gradients(module, step)
        give_gradients(twin, step)
        if limit:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), limit)
        update.apply(step)
        theirs.step()
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-7)


def training(optimizer: Any) -> Any:
    optimizer.train()
    return optimizer


def references() -> dict[str, Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]]:
    """What a library's user would write; the rate is 1e-2 but for prodigy."""
    import optimi
    import torchao.optim as ao

    rate = 1e-2
    made: dict[str, Any] = {
        "optimi-lion": lambda p: [optimi.Lion(p, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)],
        "optimi-stableadamw": lambda p: [optimi.StableAdamW(p, lr=rate)],
        "optimi-adamw": lambda p: [optimi.AdamW(p, lr=rate)],
        "optimi-adam": lambda p: [optimi.Adam(p, lr=rate)],
        "optimi-radam": lambda p: [optimi.RAdam(p, lr=rate)],
        "optimi-ranger": lambda p: [optimi.Ranger(p, lr=rate)],
        "optimi-adan": lambda p: [optimi.Adan(p, lr=rate)],
        "optimi-sgd": lambda p: [optimi.SGD(p, lr=rate)],
        "torch-adam": lambda p: [torch.optim.Adam(p, lr=rate)],
        "torch-sgd": lambda p: [torch.optim.SGD(p, lr=rate)],
        "torch-radam": lambda p: [torch.optim.RAdam(p, lr=rate)],
        "torch-nadam": lambda p: [torch.optim.NAdam(p, lr=rate)],
        "torch-adafactor": lambda p: [torch.optim.Adafactor(p, lr=rate)],
        "ao-adamw8bit": lambda p: [ao.AdamW8bit(p, lr=rate)],
        "ao-adamw4bit": lambda p: [ao.AdamW4bit(p, lr=rate)],
        "ao-adamwfp8": lambda p: [ao.AdamWFp8(p, lr=rate)],
        "muon": lambda p: [
            torch.optim.Muon([x for x in p if x.ndim == 2], lr=rate, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([x for x in p if x.ndim != 2], lr=rate),
        ],
        "prodigy": lambda p: [pytest.importorskip("prodigyopt").Prodigy(p, lr=1.0)],
        "adamw_schedulefree": lambda p: [training(pytest.importorskip("schedulefree").AdamWScheduleFree(p, lr=rate))],
        "soap": lambda p: [pytest.importorskip("pytorch_optimizer").SOAP(p, lr=rate)],
    }
    for own, theirs in (("adamw", "AdamW"), ("adam", "Adam"), ("lion", "Lion"), ("ademamix", "AdEMAMix")):
        for bits in ("", "8bit"):
            made[f"bnb-{own}{bits}"] = lambda p, attribute=theirs + bits: [
                getattr(pytest.importorskip("bitsandbytes").optim, attribute)(p, lr=rate)
            ]
    return made


@pytest.mark.parametrize("name", sorted(references()))
def test_a_librarys_optimizer_is_the_librarys_on_separate_tensors(name: str) -> None:
    module, twin = wide_net(), wide_net()
    buffers = build_buffers(module)
    options = OptimizerOptions(learning_rate=1e-2, lr_scheduler="constant", max_grad_norm=0)
    update = Update(buffers, build_optimizers(name, buffers, 1), options, 20, None)
    theirs = references()[name](list(twin.parameters()))
    for parameter in twin.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(12):
        give_gradients(module, step)
        give_gradients(twin, step)
        update.apply(step)
        with torch.compiler.set_stance("force_eager"):
            for optimizer in theirs:
                optimizer.step()
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-7)
    if name == "prodigy":
        assert update.rate(0) == 1


def test_every_library_has_a_reference() -> None:
    assert sorted({*references(), "adamw_bf16", "torch-adamw"}) == ON_CPU


def test_kahan_sums_keep_what_bf16_would_lose() -> None:
    buffer = buffer_of(torch.ones(64, dtype=BF16))
    optimizer = build_optimizers("optimi-lion", [buffer], 1)[0]
    for step in range(256):
        buffer.grads.fill_(1.0)
        optimizer.step(2.0**-10, step, clip_gradients([buffer], 0, "norm"))
    assert buffer.weights[:64].float().mean().item() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_bowl_is_descended(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, 64, generator=generator)
    buffer = buffer_of(0.1 * torch.randn(64, 64, generator=generator))
    slow = name in ("adamw_schedulefree", "muon", "soap", "optimi-ranger", "torch-adafactor", "torch-radam")
    options = OptimizerOptions(learning_rate=0.2 if slow else 0.02, lr_scheduler="constant", max_grad_norm=0)
    update = Update([buffer], build_optimizers(name, [buffer], 1), options, 100, None)
    ((_, weights),) = buffer.named_views(buffer.weights)
    before = (weights - target).square().mean().item()
    for step in range(60):
        buffer.grads.copy_((weights - target).flatten())
        update.apply(step)
    assert (weights - target).square().mean().item() < 0.5 * before


@pytest.mark.parametrize(("name", "clipped"), [("optimi-sgd", True), ("optimi-stableadamw", False), ("prodigy", False)])
@pytest.mark.parametrize("method", ["norm", "value"])
def test_who_wants_no_clipping_gets_none(name: str, clipped: bool, method: str) -> None:
    results: list[Tensor] = []
    for limit in (0.0, 1e-3):
        module = net()
        buffers = build_buffers(module)
        options = OptimizerOptions(learning_rate=1e-2, lr_scheduler="constant", max_grad_norm=limit)
        options = options.model_copy(update={"grad_clip_method": method})
        update = Update(buffers, build_optimizers(name, buffers, 1), options, 20, None)
        for step in range(3):
            give_gradients(module, step)
            update.apply(step)
        results.append(buffers[0].weights.clone())
    assert torch.equal(*results) is not clipped


@pytest.mark.parametrize("name", ["ao-adamw8bit", "ao-adamw4bit", "bnb-adamw8bit"])
def test_block_quantised_state_is_small(name: str) -> None:
    buffer = buffer_of(torch.zeros(256, 256))
    optimizer = build_optimizers(name, [buffer], 1)[0]
    buffer.grads.fill_(1.0)
    optimizer.step(1e-3, 0, clip_gradients([buffer], 0, "norm"))
    size = sum(value.numel() * value.element_size() for value in optimizer.state.values())
    assert size < 2 * 256 * 256 * (0.6 if "4bit" in name else 1.1)


def test_without_a_schedule_the_average_is_the_result() -> None:
    """arXiv:2405.15682, eq. 3–5, in fp64: z the steps, x their mean, y between them; the warm-up weighs by rate²."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(64, generator=generator)
    buffer = buffer_of(torch.zeros(64, dtype=BF16))
    options = OptimizerOptions(learning_rate=1e-2, lr_scheduler="cosine", lr_warmup_steps=4, max_grad_norm=0)
    update = Update([buffer], build_optimizers("adamw_schedulefree", [buffer], 1), options, 40, None)
    assert [update.rate(step) for step in (0, 3, 4, 20, 39)] == [2e-3, 8e-3, 1e-2, 1e-2, 1e-2]
    z, x, v, weight_sum = torch.zeros(64).double(), torch.zeros(64).double(), torch.zeros(64).double(), 0.0
    for step in range(40):
        y = 0.1 * z + 0.9 * x
        assert torch.allclose(buffer.weights[:64].double(), y, atol=2**-8)
        buffer.grads[:64] = buffer.weights[:64] - target.to(BF16)
        gradient = buffer.grads[:64].double()
        update.apply(step)
        v = 0.999 * v + 0.001 * gradient**2
        z = z - update.rate(step) * gradient / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        weight_sum += update.rate(step) ** 2
        x = x + update.rate(step) ** 2 / weight_sum * (z - x)
    trained = buffer.weights.clone()
    with update.averaged():
        assert torch.allclose(buffer.weights[:64].double(), x, atol=2**-8)
        assert (buffer.weights[:64].double() - x).abs().mean() < (trained[:64].double() - x).abs().mean()
    assert torch.equal(buffer.weights, trained)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_looking_at_the_average_changes_nothing(dtype: torch.dtype) -> None:
    ends: list[dict[str, Tensor]] = []
    for looks in (0, 3):
        module = wide_net(dtype)
        buffers = build_buffers(module)
        options = OptimizerOptions(learning_rate=1e-2, max_grad_norm=0)
        update = Update(buffers, build_optimizers("adamw_schedulefree", buffers, 1), options, 10, None)
        for step in range(6):
            for _ in range(looks):
                with update.averaged():
                    pass
            give_gradients(module, step)
            update.apply(step)
        ends.append({name: value.clone() for name, value in update.state_tensors().items()})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_soap_is_adam_in_the_eigenbasis_of_the_gradients() -> None:
    """arXiv:2409.11321, algorithm 3, in fp64, as long as the basis is that of the first gradient."""
    buffer = buffer_of(torch.zeros(4, 4))
    optimizer = build_optimizers("soap", [buffer], 1)[0]
    generator = torch.Generator().manual_seed(0)
    ((_, weights),) = buffer.named_views(buffer.weights)
    wanted = torch.zeros(4, 4).double()
    m, v = torch.zeros(4, 4).double(), torch.zeros(4, 4).double()
    left, right = torch.eye(4).double(), torch.eye(4).double()
    for step in range(6):
        gradient = torch.randn(4, 4, generator=generator)
        buffer.grads.copy_(torch.nn.functional.pad(gradient.flatten(), (0, len(buffer.grads) - 16)))
        g = gradient.double()
        optimizer.step(1e-2, step, clip_gradients([buffer], 0, "norm"))
        if step == 0:
            left, right = torch.linalg.eigh(g @ g.T)[1], torch.linalg.eigh(g.T @ g)[1]
            assert not weights.any(), "the first step only looks"
            continue
        m = 0.95 * m + 0.05 * g
        v = 0.95 * v + 0.05 * (left.T @ g @ right) ** 2
        rate = 1e-2 * math.sqrt(1 - 0.95**step) / (1 - 0.95**step)
        wanted -= rate * left @ ((left.T @ m @ right) / (v.sqrt() + 1e-8)) @ right.T
        wanted *= 1 - 1e-2 * 1e-2
        assert torch.allclose(weights.double(), wanted, atol=1e-4)


def test_torchao_draws_from_no_shared_generator() -> None:
    module = wide_net(BF16)
    buffers = build_buffers(module)
    optimizer = build_optimizers("ao-adamw8bit", buffers, 1)[0]
    give_gradients(module)
    before = torch.get_rng_state()
    optimizer.step(1e-3, 0, clip_gradients(buffers, 0, "norm"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("optimi-sgd", "optimi"), ("bnb-lion", "bitsandbytes.optim"), ("prodigy", "prodigyopt")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError) as caught:
            build_any_optimizers(name, [buffer_of(torch.zeros(3))], 1)
        assert caught.value.code == "optimizer_unavailable" and "pip install" in str(caught.value.hint)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(ON_CPU)))
def test_paged_state_needs_a_gpu(name: str) -> None:
    with pytest.raises(UserError, match="CUDA") as caught:
        build_any_optimizers(name, [buffer_of(torch.zeros(3))], 1)
    assert caught.value.code == "optimizer_unavailable"


def test_the_rules_know_the_table() -> None:
    assert sorted(rules.OPTIMIZERS) == sorted(OPTIMIZERS)


def test_adamw_bf16_first_moment_decays() -> None:
    buffer = buffer_of(torch.zeros(10_000, dtype=BF16))
    optimizer = build_optimizers("adamw_bf16", [buffer], 1)[0]
    found: list[float] = []
    for step in range(4):
        buffer.grads[:10_000] = 1.0 if step == 0 else 0.0
        optimizer.step(0.0, step, clip_gradients([buffer], 0, "norm"))
        found.append(optimizer.state["exp_avg"][:10_000].float().mean().item())
    assert found == pytest.approx([0.1, 0.09, 0.081, 0.0729], rel=2e-3)


def test_adamw_bf16_second_moment_follows_the_variance() -> None:
    """With β₂ = .999 and eight bits a step without stochastic rounding would move nothing."""
    size = 10_000
    buffer = buffer_of(torch.zeros(size, dtype=BF16))
    optimizer = build_optimizers("adamw_bf16", [buffer], 1)[0]
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    for step in range(6000):
        gradient = torch.randn(size, generator=generator) * (1.0 if step < 3000 else 0.1)
        buffer.grads[:size] = gradient
        optimizer.step(0.0, step, clip_gradients([buffer], 0, "norm"))
        if step in (2999, 5999):
            found.append(optimizer.state["exp_avg_sq"][:size].float().mean().item())
    assert found == pytest.approx([0.950, 0.0567], rel=0.05)


def test_adamw_bf16_descends_a_bowl_as_fp32_does() -> None:
    size = 4096
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(size, generator=generator)
    losses: dict[torch.dtype, float] = {}
    for dtype in (BF16, FP32):
        buffer = buffer_of(torch.zeros(size, dtype=dtype))
        optimizer = build_optimizers("adamw_bf16", [buffer], 1)[0]
        for step in range(1000):
            buffer.grads[:size] = buffer.weights[:size].float() - target
            optimizer.step(1e-3, step, clip_gradients([buffer], 0, "norm"))
        losses[dtype] = (buffer.weights[:size].float() - target).square().mean().item()
    assert losses[BF16] == pytest.approx(losses[FP32], rel=0.02)


def rounded(value: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The value rounded three times, as weight and moments are, in fp32."""
    targets = tuple(torch.zeros_like(value, dtype=BF16) for _ in range(3))
    store_rounded((value,) * 3, targets, first_counters(seed, step, [0])[0], torch.tensor(True))
    return tuple(target.float() for target in targets)


def test_rounding_is_unbiased_and_reproducible() -> None:
    value = torch.full((100_000,), 1.0 + 0.3 * 2**-7)
    found = rounded(value, 5, 9)
    for some in found:
        assert set(some.tolist()) == {1.0, 1.0 + 2**-7}
        assert (some > 1).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert all(torch.equal(some, again) for some, again in zip(found, rounded(value, 5, 9), strict=True))
    assert not any(torch.equal(found[0], other) for other in found[1:])
    assert abs(torch.corrcoef(torch.stack(found))[0, 1:]).max() < 0.02, "the three are independent"
    for seed, step in ((6, 9), (5, 10)):
        assert not torch.equal(found[0], rounded(value, seed, step)[0])


def test_rounding_keeps_what_bf16_can_hold_and_the_sign() -> None:
    exact = torch.tensor([0.0, 1.0, -1.5, 2.0**-100, -3.0e38]).to(BF16).float()
    assert all(torch.equal(some, exact) for some in rounded(exact, 1, 1))
    below = -(1.0 + 0.5 * 2**-7)
    assert set(rounded(torch.full((1000,), below), 1, 1)[0].tolist()) == {-1.0, -(1.0 + 2**-7)}


def test_counters_go_on_beyond_32_bits() -> None:
    """Chunk by chunk, and with a key of their own for each 2³² elements, though the words wrap."""
    count = 2**33 // 2**20
    counters = first_counters(5, 9, range(0, 2**33, 2**20))
    assert len(set(counters)) == len(counters) and all(-(2**31) <= counter < 2**31 for counter in counters)
    wider = first_counters(5, 9, range(0, 2**33, 2**21))
    assert all((counters[index] - wider[index // 2]) % 2**32 == index % 2 * 2**20 for index in range(count))
    steps = {(after - before) % 2**32 for before, after in pairwise(counters)}
    assert 2**20 in steps and len(steps) == 2, "one jump, where the key is another"
    value = torch.full((64,), 1.0 + 0.5 * 2**-7)
    across = [torch.zeros(64, dtype=BF16) for _ in range(3)], [torch.zeros(64, dtype=BF16) for _ in range(3)]
    store_rounded((value,) * 3, tuple(across[0]), 2**31 - 32, torch.tensor(True))
    store_rounded((value,) * 3, tuple(across[1]), -(2**31), torch.tensor(True))
    assert torch.equal(across[0][0][32:], across[1][0][:32]), "counters wrap"


def plain_adamw_bf16(buffer: FlatParameters, state: dict[str, Tensor], rate: float, step: int, scale: float) -> None:
    """What `adamw_bf16` computes, in one piece and without haste; the seed is 1. Checkpoints rely on its bits."""
    count, key = len(buffer.weights), key_seed("rounding", 1, step) & 0x7FFFFFFF

    def mixed(word: Tensor, shift: int) -> Tensor:
        return word ^ ((word.long() & 0xFFFFFFFF) >> shift).int()

    word = ((torch.arange(count) + key + 2**31) % 2**32 - 2**31).int()
    word = mixed(word, 16) * -2048144789
    word = mixed(mixed(word, 15) * -1028477387, 16)
    noise = (word & 0xFFFF, (word >> 16) & 0xFFFF, mixed(word * -1640531535, 15) & 0xFFFF)
    grads = buffer.grads.float() * scale
    m = state["exp_avg"].float().lerp(grads, 1 - 0.9)
    v = (state["exp_avg_sq"].float() * 0.999).addcmul(grads, grads, value=1 - 0.999)
    w = buffer.weights.float() * (1 - rate * 0.01)
    corrected = v.sqrt() / math.sqrt(1 - 0.999 ** (step + 1)) + 1e-6
    w = w.addcdiv(m, corrected, value=-rate / (1 - 0.9 ** (step + 1)))
    for target, value, low in zip(
        (buffer.weights, state["exp_avg"], state["exp_avg_sq"]), (w, m, v), noise, strict=True
    ):
        target.copy_(((value.view(torch.int32) + low) & -65536).view(FP32))


def noisy_buffer(size: int) -> FlatParameters:
    return buffer_of(torch.randn(size, generator=torch.Generator().manual_seed(0)).to(BF16))


def give_noise(buffer: FlatParameters, step: int) -> None:
    buffer.grads.copy_(0.01 * torch.randn(buffer.grads.shape, generator=torch.Generator().manual_seed(1 + step)))


@pytest.mark.parametrize("chunk", [64, 1024, 2**20])
def test_adamw_bf16_is_the_plain_one_whatever_the_chunk(chunk: int) -> None:
    buffer, other = noisy_buffer(5000), noisy_buffer(5000)
    optimizer = ElementwiseOptimizer(buffer, ROUNDED, seed=1, chunk=chunk)
    state = {name: torch.zeros_like(other.weights) for name in ("exp_avg", "exp_avg_sq")}
    for step in range(8):
        for some in (buffer, other):
            give_noise(some, step)
        clipping = clip_gradients([buffer], 0.1, "norm")
        optimizer.step(0.01, step, clipping)
        plain_adamw_bf16(other, state, 0.01, step, clipping.scale.item())
        assert torch.equal(buffer.weights, other.weights)
        assert all(torch.equal(value, state[name]) for name, value in optimizer.state.items())


def graph_calls(buffer: FlatParameters) -> list[int]:
    """Calls of compiled graphs in a step, each with its number of operations."""
    graphs = GraphCalls()
    compiled = ElementwiseOptimizer(buffer, ROUNDED, seed=1, chunk=64, backend=graphs.backend)
    assert compiled.slower_because is None
    graphs.operations.clear()
    compiled.step(1e-3, 0, clip_gradients([buffer], 1.0, "norm"))
    return graphs.operations


def test_a_compiled_step_is_one_graph_and_a_plain_one_on_a_gpu_would_be_thousands_of_operations() -> None:
    buffer = FlatParameters(
        [(f"{index}", nn.Parameter(torch.empty(1009, 1000, dtype=BF16, device="meta"))) for index in range(900)]
    )
    (operations,) = graph_calls(buffer)
    assert operations > 30
    clipping = clip_gradients([buffer], 1.0, "norm")
    with LaunchCounter() as counter:
        ElementwiseOptimizer(buffer, ROUNDED, seed=1, chunk=2**24).step(1e-3, 0, clipping)
    assert counter.total > 2000


def test_a_buffer_beyond_31_bits_is_several_graphs() -> None:
    buffer = FlatParameters([("w", nn.Parameter(torch.empty(2**21, 1500, dtype=BF16, device="meta")))])
    assert len(graph_calls(buffer)) == 3


def test_launches_of_900_tensors_stay_within_the_limits() -> None:
    found = figures()
    assert len(found) == 5 and all(figure.is_met for figure in found), found


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise OSError("there is no compiler")

    buffer, other = noisy_buffer(100), noisy_buffer(100)
    made = ElementwiseOptimizer(buffer, ROUNDED, seed=1, chunk=64, backend=broken)
    assert made.slower_because is not None and "there is no compiler" in made.slower_because
    plain = ElementwiseOptimizer(other, ROUNDED, seed=1, chunk=64)
    for some, optimizer in ((buffer, made), (other, plain)):
        give_noise(some, 0)
        optimizer.step(0.01, 0, clip_gradients([some], 1.0, "norm"))
    assert torch.equal(buffer.weights, other.weights)
    told: list[tuple[str, str]] = []
    monkeypatch.setitem(OPTIMIZERS, "broken", lambda buffer, seed: made)  # pyright: ignore[reportArgumentType]
    build_any_optimizers("broken", [buffer], 1, lambda code, message: told.append((code, message)))
    assert [code for code, _ in told] == ["optimizer_not_compiled"] and "there is no compiler" in told[0][1]


@pytest.mark.long
def test_compiled_adamw_bf16_is_the_plain_one() -> None:
    """Inductor's C++. It adds products in another order of roundings (fused or not), which moves what lies next to a
    border by one place of bf16: other random bits would move half of all."""
    from torch._inductor import metrics

    buffer, other = noisy_buffer(300_000), noisy_buffer(300_000)
    metrics.reset()
    compiled = ElementwiseOptimizer(buffer, ROUNDED, seed=1, chunk=64, backend="inductor")
    assert compiled.slower_because is None
    assert metrics.generated_kernel_count == 1
    plain = ElementwiseOptimizer(other, ROUNDED, seed=1, chunk=2**20)
    for step in range(6):
        for some, optimizer in ((buffer, compiled), (other, plain)):
            give_noise(some, step)
            optimizer.step(0.01 / (step + 1), step, clip_gradients([some], 1.0, "norm"))
        pairs = [(buffer.weights, other.weights), *((compiled.state[name], plain.state[name]) for name in plain.state)]
        for own, wanted in pairs:
            places = (own.view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
            assert places.max() <= 1 and places.count_nonzero() < 1e-4 * len(own)
            own.copy_(wanted)
    assert metrics.generated_kernel_count == 1, "no other rate, step or seed compiles again"
    give_noise(buffer, 9)
    buffer.grads[3] = math.nan
    before = buffer.weights.clone()
    compiled.step(0.01, 6, clip_gradients([buffer], 1.0, "norm"))
    assert torch.equal(before, buffer.weights)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_state_survives_a_restart(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """k steps, state through a file, N − k steps ≡ N steps, bit for bit; the moving average too."""

    def build() -> tuple[nn.Module, Update]:
        module = wide_net(dtype)
        buffers = build_buffers(module)
        options = OptimizerOptions(learning_rate=1e-2, lr_scheduler="cosine", max_grad_norm=1.0)
        return module, Update(buffers, build_optimizers(name, buffers, 3), options, 10, Ema(buffers, 0.9))

    module, update = build()
    for step in range(10):
        if step in (0, 4):
            weights = {key: value.clone() for key, value in module.state_dict().items()}
            save_file(update.state_tensors(), tmp_path / "state.safetensors")
            torch.rand(3)
            module, update = build()
            module.load_state_dict(weights)
            update.load_state(load_file(tmp_path / "state.safetensors"))
        give_gradients(module, step)
        update.apply(step)
    straight, whole = build()
    for step in range(10):
        give_gradients(straight, step)
        whole.apply(step)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key
    for key, value in whole.state_tensors().items():
        assert torch.equal(bits(value), bits(update.state_tensors()[key])), key


@pytest.mark.parametrize("name", ["adamw_bf16", "optimi-adamw", "ao-adamw8bit"])
def test_state_that_is_incomplete_is_refused(name: str) -> None:
    def build() -> Update:
        buffers = build_buffers(wide_net())
        return Update(buffers, build_optimizers(name, buffers, 3), OptimizerOptions(), 10, None)

    update = build()
    update.buffers[0].grads.fill_(0.1)
    update.apply(0)
    tensors = update.state_tensors()
    for key in tensors:
        with pytest.raises(KeyError):
            build().load_state({other: value for other, value in tensors.items() if other != key})


# --- moving average


def test_ema_golden() -> None:
    buffer = buffer_of(torch.ones(8, dtype=BF16))
    ema = Ema([buffer], 0.995)
    buffer.weights.fill_(1.203125)
    for _ in range(5000):
        ema.update()
    assert ema.shadows[0].dtype is FP32
    assert (ema.shadows[0] - 1.203125).abs().max().item() < 1e-4


def test_ema_decay_warms_up() -> None:
    buffer = buffer_of(torch.zeros(1))
    ema = Ema([buffer], 0.995)
    buffer.weights.fill_(1.0)
    wanted = 0.0
    for updates in range(300):
        decay = min(0.995, (1 + updates) / (10 + updates))
        wanted = decay * wanted + (1 - decay)
        ema.update()
        assert ema.shadows[0][0].item() == pytest.approx(wanted, rel=1e-5)


def test_ema_in_place_gives_the_weights_back() -> None:
    module = net(BF16)
    buffers = build_buffers(module)
    ema = Ema(buffers, 0.5)
    trained = buffers[0].weights.clone()
    ema.shadows[0].fill_(2.5)
    with pytest.raises(KeyError), ema.in_place():
        assert all((value == 2.5).all() for value in module.state_dict().values())
        raise KeyError
    assert torch.equal(buffers[0].weights, trained)


# --- learning rate


def options_of(**keys: Any) -> OptimizerOptions:
    return OptimizerOptions(**{"learning_rate": 1e-4, "lr_warmup_steps": 500, "lr_scheduler": "cosine"} | keys)


@pytest.mark.parametrize(("k", "wanted"), [(0, 1.996e-7), (250, 5.010e-5), (500, 1e-4), (1799, 4e-7)])
def test_cosine_golden(k: int, wanted: float) -> None:
    assert learning_rate(options_of(), k, 1800) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("k", "wanted"), [(200, 1e-5), (11999, 4e-7)])
def test_kontext_golden(k: int, wanted: float) -> None:
    assert learning_rate(options_of(learning_rate=1e-5, lr_warmup_steps=200), k, 12000) == pytest.approx(wanted)


KINDS = ["constant", "constant_with_warmup", "linear", "cosine", "polynomial", "cosine_with_restarts", "sine"]


@given(
    kind=st.sampled_from(KINDS),
    total=st.integers(1, 60),
    warmup=st.integers(0, 70),
    cycles=st.integers(1, 4),
    power=st.floats(0.1, 4),
)
def test_schedules(kind: Any, total: int, warmup: int, cycles: int, power: float) -> None:
    options = options_of(lr_scheduler=kind, lr_warmup_steps=warmup, lr_num_cycles=cycles, lr_power=power)
    rates = [learning_rate(options, k, total) for k in range(total)]
    assert all(4e-7 * (1 - 1e-9) <= rate <= 1e-4 * (1 + 1e-9) for rate in rates[warmup:])
    rising = rates[: min(warmup, total)]
    assert rising == sorted(rising) and all(rate < 1e-4 for rate in rising)
    after = rates[warmup:]
    if not after:
        return
    assert after[0] == pytest.approx(1e-4)
    if kind in ("linear", "cosine", "polynomial"):
        assert after == sorted(after, reverse=True)
    if kind.startswith("constant"):
        assert set(after) == {1e-4}
    if len(after) > 1 and kind in ("linear", "cosine", "polynomial", "cosine_with_restarts"):
        assert after[-1] == pytest.approx(4e-7)


def test_schedule_formulas() -> None:
    middle = {
        "linear": 4e-7 + (1e-4 - 4e-7) * 0.5,
        "cosine": 4e-7 + (1e-4 - 4e-7) * 0.5,
        "polynomial": 4e-7 + (1e-4 - 4e-7) * 0.5**0.8,
        "cosine_with_restarts": 1e-4,
        "sine": 1e-4,
    }
    for kind, wanted in middle.items():
        options = options_of(lr_scheduler=kind, lr_warmup_steps=0, lr_num_cycles=2)
        assert learning_rate(options, 50, 101) == pytest.approx(wanted), kind
