"""`optimi-lion`: the library's mathematics as one function. training.md §5, §10.1; acceptance 30."""

from __future__ import annotations

import math
from typing import Any

import optimi
import pytest
import torch
from torch import Tensor, nn

from simpletuner.bench.counters import LaunchCounter
from simpletuner.bench.launches import MOST, MOST_FUSED, compiled_launches
from simpletuner.train.buffer import FlatParameters, clip_gradients
from simpletuner.train.elementwise import ElementwiseOptimizer
from simpletuner.train.libraries import Library
from simpletuner.train.library_optim import LibraryOptimizer
from simpletuner.train.lion import lion_rule
from simpletuner.train.optim import build_optimizers
from simpletuner.train.rounding import nearest

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def compiles_anew() -> None:
    """Torch compiles one function so often in a process and no more; each test asks it to."""
    torch.compiler.reset()


def noise(seed: int, size: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def buffer_of(dtype: torch.dtype, size: int = 5000, **keys: Any) -> FlatParameters:
    return FlatParameters([("w", nn.Parameter(noise(0, size).to(dtype)))], **keys)


def theirs(buffer: FlatParameters) -> LibraryOptimizer:
    """The library, driven as the other optimizers of libraries are."""
    library = Library(make=lambda p: [optimi.Lion(p, lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)])
    return LibraryOptimizer("optimi-lion", library, buffer, 1)


def rates(step: int) -> float:
    return 1e-2 / (1 + step)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_in_fp32_it_is_the_librarys(limit: float) -> None:
    own, other = buffer_of(FP32), buffer_of(FP32)
    optimizers = build_optimizers("optimi-lion", [own], 1)[0], theirs(other)
    for step in range(50):
        for buffer, optimizer in zip((own, other), optimizers, strict=True):
            buffer.grads.copy_(noise(step + 1, len(buffer.grads)))
            optimizer.step(rates(step), step, clip_gradients([buffer], limit, "norm"))
    assert (own.weights - other.weights).abs().max() <= 1e-6
    assert (optimizers[0].state["exp_avg"] - optimizers[1].state["exp_avg"]).abs().max() <= 1e-6


def test_in_bf16_it_follows_exact_arithmetic_more_closely_than_the_library() -> None:
    """What the sums add up to, against the same steps in fp64 with the moments that each has."""
    sums: list[float] = []
    for make in (lambda buffer: build_optimizers("optimi-lion", [buffer], 1)[0], theirs):
        buffer = buffer_of(BF16)
        optimizer = make(buffer)
        exact, moment = buffer.weights.double(), torch.zeros(len(buffer.weights), dtype=torch.float64)
        for step in range(50):
            g = noise(step + 1, len(buffer.grads)).to(BF16)
            buffer.grads.copy_(g)
            exact -= rates(step) * moment.lerp(g.double(), 1 - 0.9).sign()
            optimizer.step(rates(step), step, clip_gradients([buffer], 0, "norm"))
            moment = optimizer.state["exp_avg"].double()
        held = buffer.weights.double() + optimizer.state["kahan_comp"].double()
        sums.append((held - exact).abs().mean().item())
    assert sums[0] < 1e-4, "a hundredth of a place of a weight of one"
    assert sums[0] <= sums[1]


def test_state_that_the_library_made_goes_on() -> None:
    own, other = buffer_of(BF16), buffer_of(BF16)
    before = theirs(other)
    for step in range(3):
        other.grads.copy_(noise(step + 1, len(other.grads)))
        before.step(1e-3, step, clip_gradients([other], 0, "norm"))
    optimizer = build_optimizers("optimi-lion", [own], 1)[0]
    optimizer.load(before.state)
    assert set(optimizer.state) == {"exp_avg", "kahan_comp"}
    assert all(torch.equal(value, before.state[name]) for name, value in optimizer.state.items())


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("chunk", [64, 1024])
def test_chunks_change_nothing(dtype: torch.dtype, chunk: int) -> None:
    buffers = [buffer_of(dtype), buffer_of(dtype)]
    made = [
        ElementwiseOptimizer(buffer, lion_rule(dtype), seed=1, chunk=size)
        for buffer, size in zip(buffers, (chunk, 2**18), strict=True)
    ]
    for step in range(5):
        for buffer, optimizer in zip(buffers, made, strict=True):
            buffer.grads.copy_(noise(step + 1, len(buffer.grads)))
            optimizer.step(rates(step), step, clip_gradients([buffer], 1.0, "norm"))
    assert torch.equal(buffers[0].weights, buffers[1].weights)
    assert all(torch.equal(value, made[1].state[name]) for name, value in made[0].state.items())


def test_nearest_is_how_torch_rounds() -> None:
    values = torch.cat([noise(0, 10_000, scale) for scale in (1e-30, 1e-3, 1.0, 1e30)])
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0])
    for some in (values, halves):
        assert torch.equal(nearest(some), some.to(BF16).float())


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_launches(dtype: torch.dtype) -> None:
    """900 tensors: compiled a handful; as plain operations so many a chunk, and of those a CPU has more."""
    named = [(f"{index}", nn.Parameter(torch.empty(1009, 1000, dtype=dtype, device="meta"))) for index in range(900)]
    buffer = FlatParameters(named)
    assert compiled_launches(buffer, lion_rule(dtype)) <= MOST_FUSED // 2
    chunk = 2**24
    optimizer = ElementwiseOptimizer(buffer, lion_rule(dtype), seed=1, chunk=chunk)
    clipping = clip_gradients([buffer], 1.0, "norm")
    with LaunchCounter() as counter:
        optimizer.step(1e-3, 0, clipping)
    chunks = math.ceil(len(buffer.weights) / chunk)
    assert 0 < counter.total <= MOST // 4 * chunks


@pytest.mark.long
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_compiled_it_is_one_kernel_and_the_plain_one(dtype: torch.dtype) -> None:
    """Where products are added in another order, a sign may turn beside zero: of one element in 10⁵."""
    from torch._inductor import metrics

    buffer, other = buffer_of(dtype, 300_000), buffer_of(dtype, 300_000)
    metrics.reset()
    compiled = ElementwiseOptimizer(buffer, lion_rule(dtype), seed=1, chunk=64, backend="inductor")
    assert compiled.slower_because is None
    assert metrics.generated_kernel_count == 1
    plain = ElementwiseOptimizer(other, lion_rule(dtype), seed=1, chunk=2**20)
    for step in range(6):
        for some, optimizer in ((buffer, compiled), (other, plain)):
            some.grads.copy_(noise(step + 1, len(some.grads), 0.01))
            optimizer.step(rates(step), step, clip_gradients([some], 1.0, "norm"))
        pairs = [(buffer.weights, other.weights), *((compiled.state[name], plain.state[name]) for name in plain.state)]
        for own, wanted in pairs:
            assert (~torch.isclose(own, wanted, rtol=2**-8, atol=1e-8)).sum() < 1e-4 * len(own)
            own.copy_(wanted)
    assert metrics.generated_kernel_count == 1, "no other rate or step compiles again"
    buffer.grads[3] = math.nan
    before = buffer.weights.clone()
    compiled.step(0.01, 6, clip_gradients([buffer], 1.0, "norm"))
    assert torch.equal(before, buffer.weights)


@pytest.mark.long
def test_one_compiled_kernel_serves_parts_of_any_length() -> None:
    """Of a buffer whose gradients come one by one."""
    from torch._inductor import metrics

    buffer, other = buffer_of(BF16, 4096, gradients=False), buffer_of(BF16, 4096)
    metrics.reset()
    compiled = ElementwiseOptimizer(buffer, lion_rule(BF16), seed=1, chunk=64, backend="inductor")
    assert compiled.slower_because is None and metrics.generated_kernel_count == 1
    plain = ElementwiseOptimizer(other, lion_rule(BF16), seed=1, chunk=2**20)
    other.grads.copy_(noise(1, 4096))
    clipping = clip_gradients([other], 0, "norm")
    plain.step(1e-2, 0, clipping)
    compiled.begin(1e-2, 0)
    for start, stop in ((0, 32), (32, 1024), (1024, 1056), (1056, 4096)):
        compiled.step_part(start, other.grads[start:stop].clone(), clipping)
    assert metrics.generated_kernel_count == 1
    assert torch.equal(buffer.weights, other.weights)
