"""Buffers, clipping, optimizers, moving average, learning rate. training.md §5; acceptance 30, 31."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from simpletuner.config.training_options import OptimizerOptions
from simpletuner.train.buffer import FlatParameters, build_buffers, clip_gradients
from simpletuner.train.ema import Ema
from simpletuner.train.optim import OPTIMIZERS, build_optimizers
from simpletuner.train.schedule import learning_rate
from simpletuner.train.update import Update

BF16, FP32 = torch.bfloat16, torch.float32


def buffer_of(values: Tensor) -> FlatParameters:
    return FlatParameters([("w", nn.Parameter(values.clone()))])


def net(dtype: torch.dtype = FP32) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    return module.to(dtype)


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
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
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


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_lion_is_optimis_on_separate_tensors(dtype: torch.dtype) -> None:
    from optimi import Lion

    module, twin = net(dtype), net(dtype)
    buffers = build_buffers(module)
    options = OptimizerOptions(learning_rate=1e-3, lr_scheduler="constant", max_grad_norm=0)
    update = Update(buffers, build_optimizers("optimi-lion", buffers, 1), options, 20, None)
    theirs = Lion(twin.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for parameter in twin.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(20):
        give_gradients(module, step)
        give_gradients(twin, step)
        update.apply(step)
        theirs.step()
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own, other)


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


def test_rounding_is_unbiased_and_reproducible() -> None:
    from simpletuner.train.rounding import noise_bits, round_stochastically

    value = torch.full((100_000,), 1.0 + 0.3 * 2**-7)
    found: list[Tensor] = []
    for index in range(3):
        rounded = round_stochastically(value, noise_bits(0, len(value), 5, 9, value.device), index).float()
        assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
        assert (rounded > 1).float().mean().item() == pytest.approx(0.3, abs=0.01)
        found.append(rounded)
    again = round_stochastically(value, noise_bits(0, len(value), 5, 9, value.device), 0).float()
    assert torch.equal(found[0], again)
    assert not any(torch.equal(found[0], other) for other in found[1:])
    assert abs(torch.corrcoef(torch.stack(found))[0, 1:]).max() < 0.02, "the three are independent"
    for seed, step in ((6, 9), (5, 10)):
        other = round_stochastically(value, noise_bits(0, len(value), seed, step, value.device), 0).float()
        assert not torch.equal(found[0], other)


def test_rounding_keeps_what_bf16_can_hold_and_the_sign() -> None:
    from simpletuner.train.rounding import noise_bits, round_stochastically

    exact = torch.tensor([0.0, 1.0, -1.5, 2.0**-100, -3.0e38]).to(BF16).float()
    bits = noise_bits(0, 5, 1, 1, exact.device)
    for index in range(3):
        assert torch.equal(round_stochastically(exact, bits, index).float(), exact)
    below = -(1.0 + 0.5 * 2**-7)
    values = round_stochastically(torch.full((1000,), below), noise_bits(0, 1000, 1, 1, exact.device), 0).float()
    assert set(values.tolist()) == {-1.0, -(1.0 + 2**-7)}


def test_chunks_do_not_change_an_update() -> None:
    from simpletuner.train.optim import ADAMW_BF16, AdamWStochasticRounding

    results: list[Tensor] = []
    for chunk in (64, 2**20):
        buffer = buffer_of(torch.ones(1000, dtype=BF16))
        optimizer = AdamWStochasticRounding(buffer, ADAMW_BF16, seed=1, chunk=chunk)
        for step in range(5):
            buffer.grads.copy_(torch.linspace(-1, 1, len(buffer.grads)))
            optimizer.step(0.01, step, clip_gradients([buffer], 0.1, "norm"))
        results.append(buffer.weights.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_state_survives_a_restart(name: str, dtype: torch.dtype) -> None:
    """k steps, state through tensors, N − k steps ≡ N steps, bit for bit; the moving average too."""

    def build() -> tuple[nn.Module, Update]:
        module = net(dtype)
        buffers = build_buffers(module)
        options = OptimizerOptions(learning_rate=1e-2, lr_scheduler="cosine", max_grad_norm=1.0)
        return module, Update(buffers, build_optimizers(name, buffers, 3), options, 10, Ema(buffers, 0.9))

    module, update = build()
    for step in range(10):
        if step == 4:
            weights = {key: value.clone() for key, value in module.state_dict().items()}
            kept = {key: value.clone() for key, value in update.state_tensors().items()}
            module, update = build()
            module.load_state_dict(weights)
            update.load_state(kept)
        give_gradients(module, step)
        update.apply(step)
    straight, whole = build()
    for step in range(10):
        give_gradients(straight, step)
        whole.apply(step)
    for key, value in straight.state_dict().items():
        assert torch.equal(value, module.state_dict()[key]), key
    for key, value in whole.state_tensors().items():
        assert torch.equal(value, update.state_tensors()[key]), key


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
