"""How many launches an optimizer step of 900 tensors costs, counted on the meta device: no clock, no memory, no GPU.

A launch is an operation that computes or copies; that a GPU may need two kernels for one, as for a norm, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.bench.counters import LaunchCounter
from simpletuner.bench.figure import Figure
from simpletuner.train.adamw import ADAMW_BF16, rounded_adamw
from simpletuner.train.buffer import Clipping, FlatParameters, clip_gradients
from simpletuner.train.elementwise import CHUNKS, ElementwiseOptimizer, Rule
from simpletuner.train.library_optim import LibraryOptimizer
from simpletuner.train.lion import lion_rule
from simpletuner.train.optim import Optimizer, build_optimizers

TENSORS, SHAPE = 900, (1009, 1000)
"""As many parameters as PixArt 900M has, within 0.1 %."""
MOST, MOST_FUSED = 100, 20
"""training.md §10.1."""
_COMPILED = "one graph call, one copy of the factors"


def figures() -> list[Figure]:
    """Clipping and looking for what is not finite are in each; `fused`: what a GPU is given."""
    bf16, fp32 = (_buffer(dtype) for dtype in (torch.bfloat16, torch.float32))
    return [
        _figure("adamw_bf16, compiled", compiled_launches(bf16, rounded_adamw(ADAMW_BF16)), MOST_FUSED),
        _figure("torch-adamw, fp32", plain_launches(fp32, "torch-adamw"), MOST_FUSED, "torch's fused kernel"),
        _figure("optimi-lion, bf16, compiled", compiled_launches(bf16, lion_rule(bf16.weights.dtype)), MOST_FUSED),
        _figure("optimi-lion, fp32, compiled", compiled_launches(fp32, lion_rule(fp32.weights.dtype)), MOST_FUSED),
        _figure("optimi-adamw, fp32", plain_launches(fp32, "optimi-adamw"), MOST, "not fused: a pass over memory each"),
    ]


def _buffer(dtype: torch.dtype) -> FlatParameters:
    named = [(str(index), nn.Parameter(torch.empty(SHAPE, dtype=dtype, device="meta"))) for index in range(TENSORS)]
    return FlatParameters(named)


def plain_launches(buffer: FlatParameters, name: str) -> int:
    """Of the second step, when state is there."""
    (optimizer,) = build_optimizers(name, [buffer], 0)
    _clip_and_step(optimizer, buffer, 0)
    with LaunchCounter() as counter:
        _clip_and_step(optimizer, buffer, 1)
    return counter.total


def compiled_launches(buffer: FlatParameters, rule: Rule) -> int:
    """Of a rule of our own through torch.compile, a call of a graph being one: with Inductor it is one kernel."""
    graphs = GraphCalls()
    optimizer = ElementwiseOptimizer(buffer, rule, seed=0, chunk=CHUNKS["cuda"], backend=graphs.backend)
    graphs.operations.clear()
    with LaunchCounter() as counter:
        clipping = clip_gradients([buffer], 1.0, "norm")
    optimizer.step(1e-4, 1, clipping)
    # Each call is preceded by the copy of what changes from step to step.
    return counter.total + 2 * len(graphs.operations)


def _clip_and_step(optimizer: Optimizer, buffer: FlatParameters, step: int) -> None:
    clipping = clip_gradients([buffer], 1.0, "norm")
    # Libraries look at the flag, and there is nothing in a meta tensor to look at.
    finite = torch.tensor(True) if isinstance(optimizer, LibraryOptimizer) else clipping.finite
    optimizer.step(1e-4, step, Clipping(clipping.norm, clipping.scale, finite))


class GraphCalls:
    """A backend of torch.compile that runs graphs as they are and notes each call by its number of operations."""

    def __init__(self) -> None:
        self.operations: list[int] = []

    def backend(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        size = sum(node.op.startswith("call") for node in graph.graph.nodes)

        def run(*values: Any) -> Any:
            self.operations.append(size)
            return graph(*values)

        return run


def _figure(name: str, count: int, most: int, note: str = _COMPILED) -> Figure:
    limit = f"≤ {most}"
    return Figure(
        name=f"launches, {TENSORS} tensors: {name}",
        value=count,
        unit="",
        limit=limit,
        is_met=count <= most,
        note=f"{note}; clipping included",
    )
