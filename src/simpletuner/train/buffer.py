"""Trained weights and their gradients as flat buffers, one pair per dtype.

Every parameter and every gradient is a view into its buffer, so the optimizer, clipping, the moving average and the
non-finite check are a handful of operations however many tensors a model has.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

ALIGNMENT = 32
"""Elements that each tensor's start is a multiple of, so that vectorised kernels see aligned views."""


_AT_ONCE = 1 << 24
_GRADS = attrgetter("grads")


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter's place in its buffer."""

    name: str
    start: int
    shape: torch.Size


class FlatParameters:
    """The trained parameters of one dtype: `weights` and `grads`, 1-D, equal in length and type."""

    is_sharded = False
    """Whether each rank has another part of them."""
    stream = 0
    """Of random bits: ranks that have different parts round with different ones, ranks that are alike with the same."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], *, gradients: bool = True) -> None:
        """Without `gradients` there is no buffer of them (its length is 0): each parameter gets its own and is rid of
        it again."""
        self.slots: list[Slot] = []
        start = 0
        for name, parameter in named:
            self.slots.append(Slot(name, start, parameter.shape))
            start += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        first = named[0][1]
        self.weights = torch.zeros(start, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.weights) if gradients else self.weights.new_empty(0)
        for slot, (_, parameter) in zip(self.slots, named, strict=True):
            view = self.view(self.weights, slot)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.view(self.grads, slot) if gradients else None

    @staticmethod
    def view(buffer: Tensor, slot: Slot) -> Tensor:
        return buffer[slot.start : slot.start + slot.shape.numel()].view(slot.shape)

    def named_views(self, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parts of any buffer of this layout, by parameter name."""
        for slot in self.slots:
            yield slot.name, self.view(buffer, slot)

    def spread(self, flat: Tensor) -> Mapping[str, Tensor]:
        """Of a buffer of this layout of each rank: the tensors that they are together, by parameter name."""
        return dict(self.named_views(flat))

    @property
    def layout(self) -> str:
        """A hash of names, shapes, places and type: state of another layout is foreign."""
        rows = [f"{slot.name}:{tuple(slot.shape)}:{slot.start}" for slot in self.slots]
        return hashlib.sha256("\n".join([str(self.weights.dtype), *rows]).encode()).hexdigest()


def build_buffers(module: nn.Module, without: Container[str] = (), *, gradients: bool = True) -> list[FlatParameters]:
    """Move the parameters that require gradients into flat buffers, grouped by dtype in order of first appearance."""
    groups: dict[torch.dtype, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name not in without:
            groups.setdefault(parameter.dtype, []).append((name, parameter))
    return [FlatParameters(named, gradients=gradients) for named in groups.values()]


@dataclass(frozen=True, slots=True)
class Clipping:
    """What is to be done with the gradients of a step; scalars on the device, nothing is waited for."""

    norm: Tensor
    """2-norm over all buffers before clipping, fp32."""
    scale: Tensor
    """Factor ≤ 1 that brings the norm to the limit; optimizers apply it in fp32."""
    finite: Tensor
    """Whether the norm is a number; if not, the update must change nothing."""


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm over all of them, fp32, without a host synchronisation."""
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for some in tensors for part in _parts(some)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _parts(grads: Tensor) -> tuple[Tensor, ...]:
    """On a CPU the norm of bf16 values is taken of an fp32 copy: twice the gradients themselves, if not in parts."""
    return grads.split(_AT_ONCE) if grads.device.type == "cpu" else (grads,)


@torch.no_grad()
def clip_gradients(
    buffers: list[FlatParameters],
    limit: float,
    method: str,
    add_up: Callable[[Sequence[Tensor]], None] = lambda tensors: None,
) -> Clipping:
    """`norm`: g·min(1, limit/‖g‖₂) over all buffers; `value`: each element to ±limit, in place. Limit 0: never.

    `add_up` makes the sum over all ranks, of what each has a part of.
    """
    whole = [buffer for buffer in buffers if not buffer.is_sharded]
    if len(whole) == len(buffers):
        norm = norm_of(map(_GRADS, buffers))
    else:
        squared = norm_of(buffer.grads for buffer in buffers if buffer.is_sharded).square()
        add_up([squared])
        norm = (squared + norm_of(map(_GRADS, whole)).square() if whole else squared).sqrt()
    scale = (limit / norm).clamp(max=1.0) if limit and method == "norm" else torch.ones_like(norm)
    if limit and method == "value":
        for buffer in buffers:
            buffer.grads.clamp_(-limit, limit)
    # Neither infinite nor NaN, in one operation: a norm is not negative.
    return Clipping(norm, scale, norm < math.inf)
