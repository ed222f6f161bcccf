"""The optimizer step as the loop sees it: clip, step, moving average, fresh gradients."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from simpletuner.config.training_options import OptimizerOptions
from simpletuner.train.buffer import FlatParameters, clip_gradients
from simpletuner.train.ema import Ema
from simpletuner.train.optim import Optimizer
from simpletuner.train.ranks import ALONE, Ranks
from simpletuner.train.schedule import learning_rate
from simpletuner.train.stored import Below


class Update:
    """No host synchronisation: rate and step are known to the host, norm and loss stay on the device."""

    def __init__(
        self,
        buffers: list[FlatParameters],
        optimizers: list[Optimizer],
        options: OptimizerOptions,
        total_steps: int,
        ema: Ema | None,
        *,
        keeps_weights: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """`keeps_weights`: the trained weights are part of the state, not only of a file that others read.

        They always are where that file has their average in their place.
        """
        averages = optimizers[0].averages
        self._keeps_weights = keeps_weights or averages
        self._ranks = ranks
        self.buffers = buffers
        self.optimizers = optimizers
        self.ema = ema
        self._options = options.model_copy(update={"lr_scheduler": "constant"}) if averages else options
        self._total = total_steps

    def rate(self, step: int) -> float:
        own = self.optimizers[0].own_rate
        return learning_rate(self._options, step, self._total) if own is None else own

    @property
    def gradients(self) -> list[Tensor]:
        return [buffer.grads for buffer in self.buffers]

    @property
    def own_gradients(self) -> list[Tensor]:
        """Those that are of this rank's samples alone; the others FSDP has added up."""
        return [buffer.grads for buffer in self.buffers if not buffer.is_sharded]

    def begin(self, step: int) -> None:
        """Before the backward pass of the 0-based optimizer step."""

    def apply(self, step: int) -> Tensor:
        """Perform the 0-based optimizer step; returns the unclipped gradient norm, fp32 scalar on the device."""
        limit = self._options.max_grad_norm if self.optimizers[0].clips else 0.0
        clipping = clip_gradients(self.buffers, limit, self._options.grad_clip_method, self._ranks.add_up)
        rate = self.rate(step)
        for optimizer in self.optimizers:
            optimizer.step(rate, step, clipping)
        if self.ema is not None:
            self.ema.update()
        for buffer in self.buffers:
            buffer.grads.zero_()
        return clipping.norm

    @contextmanager
    def averaged(self) -> Generator[None]:
        """What is drawn, measured, saved and exported: the optimizer's own average of the weights, if it keeps one."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                stack.enter_context(optimizer.averaged())
            yield

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything of optimizers and moving average that a restart needs and that is alike on all ranks."""
        tensors: dict[str, Tensor] = {}
        if self._keeps_weights:
            tensors |= {f"weights.{index}": buffer.weights for index, buffer in enumerate(self.buffers)}
        for index, optimizer in enumerate(self.optimizers):
            tensors |= {f"optimizer.{index}.{name}": value for name, value in optimizer.state.items()}
        if self.ema is not None:
            tensors |= {f"ema.{index}": shadow for index, shadow in enumerate(self.ema.shadows)}
        for _, name, _ in self._spread():
            del tensors[name]
        if self.ema is not None:
            tensors["ema.updates"] = torch.tensor(self.ema.updates)
        return tensors

    def spread_state(self) -> dict[str, Tensor]:
        """The rest of it: tensors of which each rank has a part."""
        found: dict[str, Tensor] = {}
        for index, name, flat in self._spread():
            found |= {f"{name}.{parameter}": tensor for parameter, tensor in self.buffers[index].spread(flat).items()}
        return found

    def _spread(self) -> Iterator[tuple[int, str, Tensor]]:
        """Number of the buffer, name and tensor of each state that is as long as a buffer of which ranks have parts."""
        for index, buffer in enumerate(self.buffers):
            if not buffer.is_sharded:
                continue
            for name, value in self.optimizers[index].state.items():
                if value.shape == buffer.weights.shape:
                    yield index, f"optimizer.{index}.{name}", value
            if self.ema is not None:
                yield index, f"ema.{index}", self.ema.shadows[index]

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy into place, one tensor after the other.

        Raises KeyError when one is missing, RuntimeError when one does not fit.
        """
        if self._keeps_weights:
            for index, buffer in enumerate(self.buffers):
                buffer.weights.copy_(tensors[f"weights.{index}"])
        for index, optimizer in enumerate(self.optimizers):
            stored = Below(f"optimizer.{index}.", tensors)
            optimizer.load({**optimizer.state, **stored} if self.buffers[index].is_sharded else stored)
        if self.ema is not None and "ema.updates" in tensors:
            self.ema.updates = int(tensors["ema.updates"])
            for index, shadow in enumerate(self.ema.shadows):
                if not self.buffers[index].is_sharded:
                    shadow.copy_(tensors[f"ema.{index}"])

    @property
    def layout(self) -> list[str]:
        return [buffer.layout for buffer in self.buffers]
