"""The optimizer's step inside the backward pass: no gradient outlives its use. training.md §2.3; docs/adr/0032."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from simpletuner.config.training_options import OptimizerOptions
from simpletuner.train.buffer import ALIGNMENT, Clipping, FlatParameters, Slot, norm_of
from simpletuner.train.elementwise import OwnOptimizer
from simpletuner.train.ema import Ema
from simpletuner.train.optim import Optimizer
from simpletuner.train.ranks import ALONE, Ranks
from simpletuner.train.update import Update


@dataclass(frozen=True, slots=True)
class _Part:
    """A parameter's place, and who steps it."""

    buffer: FlatParameters
    slot: Slot
    optimizer: OwnOptimizer


class BackwardUpdate(Update):
    """Weights and state as of `Update` to the bit, as long as every gradient is finite.

    Autograd calls when a parameter's gradient is complete, which is after the last use of that parameter in the
    backward pass. What is not finite leaves its own parameter as it is, not all. The ranks of a run have the same
    graph, so that their gradients come in the same order and are summed one by one.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        buffers: list[FlatParameters],
        optimizers: list[Optimizer],
        options: OptimizerOptions,
        total_steps: int,
        ema: Ema | None,
        *,
        keeps_weights: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """`buffers` without gradients, of the parameters of `denoiser`; `optimizers` that step in parts."""
        super().__init__(buffers, optimizers, options, total_steps, ema, keeps_weights=keeps_weights, ranks=ranks)
        assert options.grad_clip_method == "value" or not options.max_grad_norm
        self._limit = options.max_grad_norm
        self._in_parts = [optimizer for optimizer in optimizers if isinstance(optimizer, OwnOptimizer)]
        self._one = torch.ones((), device=buffers[0].weights.device)
        self._squares = torch.zeros_like(self._one)
        self._unused: dict[str, _Part] = {}
        self._parts: dict[str, _Part] = {}
        parameters = dict(denoiser.named_parameters())
        for buffer, optimizer in zip(buffers, self._in_parts, strict=True):
            for slot in buffer.slots:
                part = self._parts[slot.name] = _Part(buffer, slot, optimizer)
                parameters[slot.name].register_post_accumulate_grad_hook(partial(self._use, part))

    @property
    def gradients(self) -> list[Tensor]:
        return []

    @property
    def own_gradients(self) -> list[Tensor]:
        return []

    def begin(self, step: int) -> None:
        rate = self.rate(step)
        for optimizer in self._in_parts:
            optimizer.begin(rate, step)
        self._squares.zero_()
        self._unused = dict(self._parts)

    @torch.no_grad()
    def apply(self, step: int) -> Tensor:
        """What is left of a step after its backward pass; the norm is that of all gradients, before clipping."""
        for part in self._unused.values():
            # A gradient of zeros: moments fade and weights decay, as they do in one step of all.
            self._step(part, part.buffer.weights.new_zeros(part.slot.shape))
        self._unused = {}
        if self.ema is not None:
            self.ema.update()
        return self._squares.sqrt()

    def _use(self, part: _Part, parameter: Tensor) -> None:
        grads, parameter.grad = parameter.grad, None
        assert grads is not None
        if self._ranks.count > 1:
            # A copy: its memory may be that of another gradient on its way.
            grads = grads.clone()
            self._ranks.add_up([grads])
        self._step(part, grads)
        del self._unused[part.slot.name]

    def _step(self, part: _Part, grads: Tensor) -> None:
        flat = grads.reshape(-1)
        # Whole slots, so that vectorised kernels treat each element as they do in the middle of a buffer.
        if missing := -len(flat) % ALIGNMENT:
            flat = nn.functional.pad(flat, (0, missing))
        norm = norm_of([flat])
        self._squares.addcmul_(norm, norm)
        if self._limit:
            flat = flat.clamp(-self._limit, self._limit)
        part.optimizer.step_part(part.slot.start, flat, Clipping(norm, self._one, norm < math.inf))
