"""Drives optimizers of other libraries over flat buffers. Which there are: `libraries`.

An algorithm that treats every element alike gets the buffer as its only parameter; one that looks at whole tensors,
or quantises state in blocks, gets the tensors.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simpletuner.errors import ExitCode, UserError
from simpletuner.train.buffer import Clipping, FlatParameters, Slot
from simpletuner.train.libraries import Library

_CONSTANTS = frozenset({"qmap", "qmap1", "qmap2"})
"""Tables of quantised values: equal in every run, and shared between tensors, which safetensors refuses."""


class LibraryOptimizer:
    """Drives a library's optimizer on a buffer.

    Libraries make their state in their first step, so that of a fresh optimizer is only `steps`, the updates made.
    Loading makes it by a step on zero gradients that is undone, then copies every tensor and number into place.
    """

    def __init__(self, name: str, library: Library, buffer: FlatParameters, seed: int) -> None:
        self.clips = library.clips
        self.own_rate = library.own_rate
        self.averages = library.averages
        self.slower_because: str | None = None
        self._library = library
        self._buffer = buffer
        self._seed = seed
        self._steps = torch.zeros((), dtype=torch.int64)
        if lacking := library.lacks(buffer.weights.device):
            raise _unavailable(name, f"It needs {lacking}.", "Choose another optimizer, such as adamw_bf16.")
        self._has_copy = library.in_fp32 and buffer.weights.dtype is not torch.float32
        self._weights = buffer.weights.float() if self._has_copy else buffer.weights
        self._parameters = _parameters(buffer, self._weights, views=library.views)
        if not self._has_copy:
            self._give_gradients(buffer.grads)
        try:
            self._optimizers = library.make(list(self._parameters))
        except ImportError as error:
            message = f"It needs a library that cannot be imported: {error}."
            raise _unavailable(name, message, library.install) from error

    @property
    def state(self) -> dict[str, Tensor]:
        tensors = {"steps": self._steps}
        if self._has_copy:
            tensors["weights"] = self._weights
        for name, holder, key in self._places():
            tensors.update((leaf_name, leaf.contiguous()) for leaf_name, leaf in _leaves(name, holder[key]))
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises KeyError when a tensor is missing, RuntimeError when one does not fit."""
        self._steps.copy_(tensors["steps"])
        if self._has_copy:
            self._weights.copy_(tensors["weights"])
            self._buffer.weights.copy_(self._weights)
        if not self._steps:
            return
        self._make_state()
        for name, holder, key in self._places():
            value = holder[key]
            if isinstance(value, int | float):
                holder[key] = type(value)(tensors[name].item())
                continue
            for leaf_name, leaf in _leaves(name, value):
                leaf.copy_(tensors[leaf_name])

    def step(self, rate: float, step: int, clipping: Clipping) -> None:
        # Libraries have no way to be told on the device: this one wait for it is theirs.
        if not clipping.finite:
            return
        grads = self._buffer.grads.float() if self._has_copy else self._buffer.grads
        if self.clips:
            grads.mul_(clipping.scale)
        self._run(rate, step, grads)
        self._steps.add_(1)

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Inside the block the buffer holds the optimizer's average, where it keeps one; then the weights again."""
        if not self.averages:
            yield
            return
        optimizers: list[Any] = self._optimizers
        # The way back by arithmetic would be off by a rounding.
        kept = self._weights.clone()
        for optimizer in optimizers:
            optimizer.eval()
        try:
            self._buffer.weights.copy_(self._weights)
            yield
        finally:
            for optimizer in optimizers:
                optimizer.train()
            self._weights.copy_(kept)
            self._buffer.weights.copy_(self._weights)

    def _run(self, rate: float, step: int, grads: Tensor) -> None:
        device = self._buffer.weights.device
        if self._has_copy:
            self._give_gradients(grads)
        with ExitStack() as stack:
            if self._library.draws:
                stack.enter_context(_own_noise(device, self._seed, step))
            if self._library.eager_on_cpu and device.type == "cpu":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for optimizer in self._optimizers:
                _set_rate(optimizer, rate)
                optimizer.step()
        if self._has_copy:
            self._give_gradients(None)
            self._buffer.weights.copy_(self._weights)

    def _give_gradients(self, grads: Tensor | None) -> None:
        """Show the library where the gradients lie; None: an fp32 copy that is no longer needed."""
        for parameter, slot in self._parameters.items():
            parameter.grad = grads if slot is None or grads is None else self._buffer.view(grads, slot)

    def _make_state(self) -> None:
        """Gradients are zero afterwards, as they are before the first step of a run."""
        weights = self._weights
        kept = weights.to("cpu", copy=True)  # a large model leaves no room for a second one on the device
        self._buffer.grads.zero_()
        weights.fill_(1)  # prodigy keeps no first weights where all are zero
        self._run(0.0 if self.own_rate is None else self.own_rate, 0, self._buffer.grads.to(weights.dtype))
        weights.copy_(kept)
        self._buffer.weights.copy_(weights)

    def _places(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Name, dictionary and key of everything that steps change."""
        for index, optimizer in enumerate(self._optimizers):
            group = optimizer.param_groups[0]
            for key, value in group.items():
                if key in self._library.counters or (isinstance(value, Tensor) and key != "lr"):
                    yield f"group{index}.{key}", group, key
            for parameter in group["params"]:
                holder = optimizer.state.get(parameter, {})
                slot = self._parameters[parameter]
                prefix = "" if slot is None else f"{slot.name}."
                for key, value in holder.items():
                    if key not in _CONSTANTS and isinstance(value, Tensor | int | float | list):
                        yield f"{prefix}{key}", holder, key


def _parameters(buffer: FlatParameters, weights: Tensor, *, views: bool) -> dict[nn.Parameter, Slot | None]:
    """What a library is given: the tensors with their places, or all of them as one without."""
    if not views:
        return {nn.Parameter(weights): None}
    return {nn.Parameter(buffer.view(weights, slot)): slot for slot in buffer.slots}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Plain tensors: of a quantised one or a list its parts, of a number a copy."""
    if isinstance(value, list):
        for index, part in enumerate(cast(list[Any], value)):
            yield from _leaves(f"{name}.{index}", part)
    elif not isinstance(value, Tensor):
        yield name, torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
    elif is_traceable_wrapper_subclass(value):
        for key in value.__tensor_flatten__()[0]:
            if key not in _CONSTANTS:
                yield from _leaves(f"{name}.{key}", getattr(value, key))
    else:
        yield name, value


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


@contextmanager
def _own_noise(device: torch.device, seed: int, step: int) -> Generator[None]:
    """What is drawn inside depends on seed and step alone, and moves no generator."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield


def _unavailable(name: str, message: str, hint: str) -> UserError:
    return UserError(
        "optimizer_unavailable",
        f"The optimizer {name} is not available here. {message}",
        hint=hint,
        pointer="/--optimizer",
        exit_code=ExitCode.CONFIG,
    )
