"""`optimizer_release_gradients`: the same weights and state without gradients of the whole model. training.md §2.3."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from simpletuner.bench.counters import HOST_SYNCS, LaunchCounter
from simpletuner.config.release_rule import IN_PARTS
from simpletuner.config.training_options import OptimizerOptions
from simpletuner.train.adamw import ADAMW_BF16, rounded_adamw
from simpletuner.train.backward_update import BackwardUpdate
from simpletuner.train.buffer import build_buffers
from simpletuner.train.elementwise import ElementwiseOptimizer, OwnOptimizer
from simpletuner.train.ema import Ema
from simpletuner.train.lion import lion_rule
from simpletuner.train.meter import Meter
from simpletuner.train.optim import OPTIMIZERS, build_optimizers
from simpletuner.train.update import Update

BF16, FP32 = torch.bfloat16, torch.float32
STEPS = 20


class Net(nn.Module):
    """With what makes it hard: sizes that are no multiple of anything, a weight that is used twice, a block that is
    recomputed, a parameter that nothing uses, one larger than a chunk of a CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 33)
        self.twice = nn.Linear(33, 33, bias=False)
        self.block = nn.Sequential(nn.Linear(33, 9001), nn.GELU(), nn.Linear(9001, 5))
        self.unused = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.ones(()))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.twice(self.first(x))))
        return self.scale * checkpoint(self.block, hidden, use_reentrant=False)


Spoil = Callable[[Tensor], Tensor]


def trained(
    name: str,
    dtype: torch.dtype,
    *,
    released: bool,
    steps: range = range(STEPS),
    start: Path | None = None,
    **keys: Any,
) -> tuple[Net, Update, list[float]]:
    """A module after so many steps, begun from the weights and state in `start`; and the norms."""
    module, update = built(name, dtype, released=released, **keys)
    if start is not None:
        tensors = load_file(start)
        module.load_state_dict({key: tensors[f"net.{key}"] for key in module.state_dict()})
        update.load_state(tensors)
    norms = [one_step(module, update, step) for step in steps]
    return module, update, norms


def built(name: str, dtype: torch.dtype, *, released: bool, **keys: Any) -> tuple[Net, Update]:
    module = Net(dtype)
    buffers = build_buffers(module, gradients=not released)
    values = {"learning_rate": 1e-2, "lr_scheduler": "cosine", "max_grad_norm": 0.0} | keys
    options = OptimizerOptions(**values)
    optimizers = build_optimizers(name, buffers, 3)
    ema = Ema(buffers, 0.9)
    if released:
        return module, BackwardUpdate(module, buffers, optimizers, options, STEPS, ema)
    return module, Update(buffers, optimizers, options, STEPS, ema)


def one_step(module: Net, update: Update, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    dtype = module.first.weight.dtype
    x, target = torch.randn(4, 7, generator=generator).to(dtype), torch.randn(4, 5, generator=generator).to(dtype)
    update.begin(step)
    (module(x) - target).square().mean().backward()
    return update.apply(step).item()


def saved(module: Net, update: Update, file: Path) -> Path:
    save_file({**update.state_tensors(), **{f"net.{key}": value for key, value in module.state_dict().items()}}, file)
    return file


def same(one: tuple[Net, Update, Any], other: tuple[Net, Update, Any]) -> None:
    for left, right in (
        (one[0].state_dict(), other[0].state_dict()),
        (one[1].state_tensors(), other[1].state_tensors()),
    ):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert torch.equal(value, right[key]), key


@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 1e-3, "grad_clip_method": "value"}], ids=["", "value"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", IN_PARTS)
def test_it_is_the_step_of_all_at_once(name: str, dtype: torch.dtype, clip: dict[str, Any]) -> None:
    """To the bit: weights, moments, the counted random bits of `adamw_bf16`, the moving average."""
    whole = trained(name, dtype, released=False, **clip)
    parts = trained(name, dtype, released=True, **clip)
    same(whole, parts)
    assert parts[2] == pytest.approx(whole[2], rel=1e-3), "a CPU adds up in fp32, one after the other"
    assert not torch.equal(parts[0].first.weight, Net(dtype).first.weight)
    if dtype is FP32 and name != "optimi-lion":
        assert (parts[0].unused != 1).any(), "what nothing uses decays all the same"


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", IN_PARTS)
def test_it_goes_on_where_either_way_stopped(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    straight = trained(name, dtype, released=True)
    for before in (True, False):
        module, update, _ = trained(name, dtype, released=before, steps=range(8))
        file = saved(module, update, tmp_path / f"{before}.safetensors")
        same(straight, trained(name, dtype, released=True, steps=range(8, STEPS), start=file))


def test_gradients_are_gone_as_soon_as_they_are_used() -> None:
    """The peak is lower by what all gradients take, but for the largest one that is on its way."""
    peaks: list[int] = []
    for released in (False, True):
        module, update = built("torch-adamw", FP32, released=released)
        held = [*update.gradients, *update.state_tensors().values(), *(buffer.weights for buffer in update.buffers)]
        meter = Meter(FakeTensorMode())
        with meter:
            for tensor in held:
                tensor.detach()  # an operation, so that its storage is seen
            one_step(module, update, 0)
        peaks.append(meter.peak_bytes)
        assert released == all(parameter.grad is None for parameter in module.parameters())
    all_gradients = 4 * sum(parameter.numel() for parameter in Net(FP32).parameters())
    largest = 4 * 9001 * 33
    assert peaks[0] - peaks[1] >= 0.95 * (all_gradients - largest)
    assert peaks[0] - peaks[1] <= all_gradients


@pytest.mark.parametrize("name", IN_PARTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_alone(name: str, bad: float) -> None:
    """Of the parameter whose gradient it is neither weights nor moments change; the others go on; the norm tells."""
    module, update, _ = trained(name, BF16, released=True, steps=range(2))
    spoiled, other = module.twice.weight, module.first.weight
    kept = spoiled.clone(), other.clone()
    moments = update.state_tensors()["optimizer.0.exp_avg"].clone()
    hook = spoiled.register_hook(lambda grad: torch.full_like(grad, bad))
    norm = one_step(module, update, 2)
    hook.remove()
    assert not math.isfinite(norm)
    assert torch.equal(spoiled, kept[0]) and not torch.equal(other, kept[1])
    buffer = update.buffers[0]
    for slot in buffer.slots:
        before, after = (buffer.view(some, slot) for some in (moments, update.state_tensors()["optimizer.0.exp_avg"]))
        assert torch.equal(before, after) == (slot.name in ("twice.weight", "unused"))
    assert math.isfinite(one_step(module, update, 3))
    assert not torch.equal(spoiled, kept[0]) and all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", IN_PARTS)
def test_nobody_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    module, update = built(name, dtype, released=True)
    one_step(module, update, 0)
    with LaunchCounter() as counter:
        update.begin(1)
        module(torch.ones(4, 7, dtype=dtype)).square().mean().backward()
        update.apply(1)
    assert counter.total and not set(counter.counts) & set(HOST_SYNCS)


@pytest.mark.long
@pytest.mark.parametrize("name", ["adamw_bf16", "optimi-lion"])
def test_one_compiled_kernel_serves_all_parameters(name: str) -> None:
    """Inside the backward pass too; what a GPU is given, by Inductor's C++."""
    from torch._inductor import metrics

    rule = rounded_adamw(ADAMW_BF16) if name == "adamw_bf16" else lion_rule(BF16)
    module = Net(BF16)
    buffers = build_buffers(module, gradients=False)
    metrics.reset()
    made: list[Any] = [ElementwiseOptimizer(buffers[0], rule, seed=3, chunk=64, backend="inductor")]
    assert made[0].slower_because is None and metrics.generated_kernel_count == 1
    options = OptimizerOptions(learning_rate=1e-2, lr_scheduler="cosine", max_grad_norm=0)
    compiled = BackwardUpdate(module, buffers, made, options, STEPS, None)
    plain, update = built(name, BF16, released=False)
    for step in range(3):
        plain.load_state_dict(module.state_dict())
        for key, value in update.optimizers[0].state.items():
            value.copy_(made[0].state[key])
        one_step(module, compiled, step)
        one_step(plain, update, step)
        for own, wanted in zip(module.parameters(), plain.parameters(), strict=True):
            # Products that are added in another order may round to the next place, or turn a sign beside zero.
            assert (~torch.isclose(own, wanted, rtol=2**-6, atol=1e-8)).sum() <= 1e-4 * own.numel()
    assert metrics.generated_kernel_count == 1


def test_the_rules_name_the_optimizers_that_step_in_parts() -> None:
    for name in OPTIMIZERS:
        if name.startswith(("bnb-", "ao-")) or name in ("prodigy", "soap", "adamw_schedulefree", "muon"):
            continue
        (made,) = build_optimizers(name, build_buffers(nn.Linear(3, 3)), 1)
        assert isinstance(made, OwnOptimizer) == (name in IN_PARTS)
