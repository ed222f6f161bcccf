"""Optimizers whose step for one element looks at no other. docs/adr/0025, 0032.

Their mathematics is one function of flat tensors: run as plain operations, or compiled to one kernel. No GPU has run
the compiled form: it is proven with Inductor's C++ on a CPU.
"""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import sub
from typing import Any, Literal

import torch
from torch import Tensor

from simpletuner.train.buffer import ALIGNMENT, Clipping, FlatParameters
from simpletuner.train.rounding import first_counters

SPAN = 2**30
"""Elements of one compiled call: their places fit 32 bits, and a counter's period is a multiple of it."""

CHUNKS: Mapping[str, int] = {"cpu": 2**18, "cuda": 2**24}
"""Elements at a time of plain operations: fp32 temporaries that fit the cache of a CPU core, few launches on a GPU."""

Backend = Literal["inductor"] | Callable[..., Any]
"""Of torch.compile."""


class OwnOptimizer(ABC):
    """Clipped, on the schedule, with its state made at once: tensors like the weights, and numbers.

    A step may be made part by part: `begin`, then `step_part` for each, in any order.
    """

    clips = True
    own_rate: float | None = None
    averages = False
    slower_because: str | None = None
    state: dict[str, Tensor]

    def __init__(self, buffer: FlatParameters) -> None:
        self._buffer = buffer

    def averaged(self) -> AbstractContextManager[None]:
        return nullcontext()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.state.items():
            value.copy_(tensors[name])

    def step(self, rate: float, step: int, clipping: Clipping) -> None:
        self.begin(rate, step, clipping.finite)
        self.step_part(0, self._buffer.grads, clipping)

    @abstractmethod
    def begin(self, rate: float, step: int, finite: Tensor | None = None) -> None:
        """The 0-based step. `finite`: whether it changes anything, where that is known before."""

    @abstractmethod
    def step_part(self, start: int, grads: Tensor, clipping: Clipping) -> None:
        """Of the elements from `start` on, which have these gradients, (N,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How a step changes each element."""

    state: tuple[str, ...]
    """Names of its tensors, each like the weights."""
    factors: Callable[[float, int], tuple[float, ...]]
    """Rate and 0-based step → what is the same for all elements."""
    change: Callable[..., None]
    """Called with weights, gradients and the state, (N,) each, which it changes in place; then `scale`, `finite`, a
    counter as of `store_rounded`, and the factors: numbers, or scalar tensors of int32 and fp32, with the same result
    to the bit. Every operation is elementwise, so that a compiler makes one kernel of them."""


class ElementwiseOptimizer(OwnOptimizer):
    """Any rule, on the whole buffer in chunks."""

    def __init__(
        self, buffer: FlatParameters, rule: Rule, *, seed: int, chunk: int, backend: Backend | None = None
    ) -> None:
        """`chunk`: so many elements at a time; with a `backend` of torch.compile up to `SPAN`, if that can compile.

        It is a divisor of `COUNTERS`.
        """
        super().__init__(buffer)
        self._rule = rule
        self._seed = seed
        self._chunk = chunk
        self._step = 0
        self._factors: tuple[float, ...] = ()
        self._compiled: CompiledRule | None = None
        self.slower_because: str | None = None
        self.state = {name: torch.zeros_like(buffer.weights) for name in rule.state}
        if backend is not None:
            self._try_to_compile(backend)

    def begin(self, rate: float, step: int, finite: Tensor | None = None) -> None:
        self._step, self._factors = step, self._rule.factors(rate, step)

    @torch.no_grad()
    def step_part(self, start: int, grads: Tensor, clipping: Clipping) -> None:
        compiled, factors, change = self._compiled, self._factors, self._rule.change
        size, stop = SPAN if compiled else self._chunk, start + len(grads)
        # At multiples of the size wherever a part begins: nothing goes beyond a counter's period.
        edges = [start, *range((start // size + 1) * size, stop, size), stop]
        sizes = list(map(sub, edges[1:], edges))
        changed = [tensor[start:stop].split(sizes) for tensor in (self._buffer.weights, *self.state.values())]
        counters = first_counters(self._seed, self._step, edges[:-1])
        for counter, grad, weights, *state in zip(counters, grads.split(sizes), *changed, strict=True):
            if compiled:
                compiled((weights, grad, *state), clipping, counter, factors)
            else:
                change(weights, grad, *state, clipping.scale, clipping.finite, counter, *factors)

    def _try_to_compile(self, backend: Backend) -> None:
        """By a step that changes nothing, so that what goes wrong does so before the first one, and harms nothing."""
        in_parts = not len(self._buffer.grads)
        self._compiled = CompiledRule(self._rule, backend, any_length=in_parts)
        scalar = torch.ones((), device=self._buffer.weights.device)
        grads = torch.zeros_like(self._buffer.weights[:ALIGNMENT]) if in_parts else self._buffer.grads
        try:
            self.begin(0.0, 0)
            self.step_part(0, grads, Clipping(scalar, scalar, scalar == 0))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            # No compiler, no Triton, a version of them that does not fit: torch wraps them in RuntimeErrors of its own.
            self._compiled = None
            self.slower_because = " ".join(str(error).strip().partition("\n\n")[0].split())


class CompiledRule:
    """A rule through torch.compile. What changes from step to step is a tensor: nothing recompiles."""

    def __init__(self, rule: Rule, backend: Backend, *, any_length: bool = False) -> None:
        """`any_length`: one kernel for all; otherwise for each, a little quicker."""
        # One kernel needs no pool of compiling processes beside the trainer.
        options: dict[str, Any] | None = {"compile_threads": 1} if backend == "inductor" else None
        # fullgraph: a break would mean several kernels, and be found by nobody.
        self._change = torch.compile(
            partial(_change, rule.change),
            backend=backend,
            fullgraph=True,
            options=options,
            dynamic=True if any_length else None,
        )

    def __call__(self, parts: tuple[Tensor, ...], clipping: Clipping, counter: int, factors: Sequence[float]) -> None:
        device = parts[0].device
        # In fp64 the counter is exact too. Pinned, so that the copy makes nobody wait.
        numbers = torch.tensor([counter, *factors], dtype=torch.float64, pin_memory=device.type == "cuda")
        self._change(parts, clipping.scale, clipping.finite, numbers.to(device, non_blocking=True))


def _change(
    change: Callable[..., None], parts: tuple[Tensor, ...], scale: Tensor, finite: Tensor, numbers: Tensor
) -> None:
    change(*parts, scale, finite, numbers[0].to(torch.int32), *numbers[1:].float().unbind())
