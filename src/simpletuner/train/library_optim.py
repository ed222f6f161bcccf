"""Optimizers of other libraries over flat buffers: torch, torch-optimi, torchao, bitsandbytes, prodigyopt.

training.md §5. Adding one is one entry in `LIBRARIES`. An algorithm that treats every element alike gets the buffer
as its only parameter; one that looks at whole tensors, or quantises state in blocks, gets the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simpletuner.errors import ExitCode, UserError
from simpletuner.train.buffer import Clipping, FlatParameters

Make = Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]

_CONSTANTS = frozenset({"qmap", "qmap1", "qmap2"})
"""Tables of quantised values: equal in every run, and shared between tensors, which safetensors refuses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """How one optimizer of another library is made and driven."""

    make: Make
    install: str = "Install torch."
    views: bool = False
    """Whether it is given the tensors, not the buffer."""
    clips: bool = True
    """False: gradients reach it as they are, whatever `max_grad_norm` says."""
    own_rate: float | None = None
    """The rate of every step, in place of the schedule's."""
    counters: tuple[str, ...] = ()
    """Numbers in its parameter group that change from step to step."""
    lacks: Callable[[torch.device], str | None] = lambda device: None
    """What the device would need, if it does not do."""
    eager_on_cpu: bool = False
    """It compiles its step; on a CPU that costs more than it gains."""
    draws: bool = False
    """It draws from the process-wide generators."""


class LibraryOptimizer:
    """Drives a library's optimizer on a buffer.

    Libraries make their state in their first step, so that of a fresh optimizer is only `steps`, the updates made.
    Loading makes it by a step on zero gradients that is undone, then copies every tensor and number into place.
    """

    def __init__(self, name: str, library: Library, buffer: FlatParameters, seed: int) -> None:
        self.clips = library.clips
        self.own_rate = library.own_rate
        self._library = library
        self._buffer = buffer
        self._seed = seed
        self._steps = torch.zeros((), dtype=torch.int64)
        if lacking := library.lacks(buffer.weights.device):
            raise _unavailable(name, f"It needs {lacking}.", "Choose another optimizer, such as adamw_bf16.")
        self._names = _parameters(buffer, views=library.views)
        try:
            self._optimizers = library.make(list(self._names))
        except ImportError as error:
            message = f"It needs a library that cannot be imported: {error}."
            raise _unavailable(name, message, library.install) from error

    @property
    def state(self) -> dict[str, Tensor]:
        tensors = {"steps": self._steps}
        for name, holder, key in self._places():
            tensors.update(_leaves(name, holder[key]))
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises KeyError when a tensor is missing, RuntimeError when one does not fit."""
        self._steps.copy_(tensors["steps"])
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
        if self.clips:
            self._buffer.grads.mul_(clipping.scale)
        self._run(rate, step)
        self._steps.add_(1)

    def _run(self, rate: float, step: int) -> None:
        device = self._buffer.weights.device
        with ExitStack() as stack:
            if self._library.draws:
                stack.enter_context(_own_noise(device, self._seed, step))
            if self._library.eager_on_cpu and device.type == "cpu":
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for optimizer in self._optimizers:
                _set_rate(optimizer, rate)
                optimizer.step()

    def _make_state(self) -> None:
        """Gradients are zero afterwards, as they are before the first step of a run."""
        weights = self._buffer.weights
        kept = weights.to("cpu", copy=True)  # a large model leaves no room for a second one on the device
        self._buffer.grads.zero_()
        weights.fill_(1)  # prodigy keeps no first weights where all are zero
        self._run(0.0 if self.own_rate is None else self.own_rate, 0)
        weights.copy_(kept)

    def _places(self) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Name, dictionary and key of everything that steps change."""
        for index, optimizer in enumerate(self._optimizers):
            group = optimizer.param_groups[0]
            for key, value in group.items():
                if key in self._library.counters or (isinstance(value, Tensor) and key != "lr"):
                    yield f"group{index}.{key}", group, key
            for parameter in group["params"]:
                holder = optimizer.state.get(parameter, {})
                for key, value in holder.items():
                    if key not in _CONSTANTS and isinstance(value, Tensor | int | float):
                        yield f"{self._names[parameter]}{key}", holder, key


def _parameters(buffer: FlatParameters, *, views: bool) -> dict[nn.Parameter, str]:
    """What a library is given, and the prefix of each one's state."""
    if not views:
        whole = nn.Parameter(buffer.weights)
        whole.grad = buffer.grads
        return {whole: ""}
    named: dict[nn.Parameter, str] = {}
    for slot in buffer.slots:
        parameter = nn.Parameter(buffer.view(buffer.weights, slot))
        parameter.grad = buffer.view(buffer.grads, slot)
        named[parameter] = f"{slot.name}."
    return named


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Plain tensors: of a quantised one its parts, of a number a copy."""
    if not isinstance(value, Tensor):
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


# --- what there is


def _one(module: str, attribute: str, **settings: Any) -> Make:
    """One optimizer for all parameters, imported when it is made; the rate is set before each step."""

    def make(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        return [getattr(import_module(module), attribute)(parameters, lr=1.0, **settings)]

    return make


def _muon(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Matrices by Muon, everything else by AdamW.

    Updates of matrices are scaled to the size of AdamW's (arXiv:2502.16982), so that one rate suits both.
    """
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    others = [parameter for parameter in parameters if parameter.ndim != 2]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=1.0, adjust_lr_fn="match_rms_adamw"))
    if others:
        made.append(torch.optim.AdamW(others, lr=1.0))
    return made


def _lacks_for_compiling(device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"a CUDA device or a CPU, not {device.type}"
    if device.type == "cuda" and find_spec("triton") is None:
        return "triton, which compiles its step"
    return None


def _lacks_for_fp8(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 9):
        return "a GPU with fp8 (compute capability 8.9 or higher)"
    return _lacks_for_compiling(device)


def _lacks_for_pages(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "a CUDA device: its state is paged between GPU and host"


def _lacks_for_bitsandbytes(device: torch.device) -> str | None:
    return (
        None if device.type in ("cpu", "cuda", "xpu") else f"a device bitsandbytes has kernels for, not {device.type}"
    )


def _optimi(attribute: str, *, views: bool = False, clips: bool = True, **settings: Any) -> Library:
    make = _one("optimi", attribute, **settings)
    return Library(make=make, install="pip install torch-optimi", views=views, clips=clips)


def _torchao(attribute: str, lacks: Callable[[torch.device], str | None] = _lacks_for_compiling) -> Library:
    return Library(
        make=_one("torchao.optim", attribute, bf16_stochastic_round=True),
        install="pip install torchao",
        views=True,
        lacks=lacks,
        eager_on_cpu=True,
        draws=True,
    )


def _bitsandbytes() -> Iterator[tuple[str, Library]]:
    for name, attribute in (("adamw", "AdamW"), ("adam", "Adam"), ("lion", "Lion"), ("ademamix", "AdEMAMix")):
        for bits in ("", "8bit"):
            for paged in (False, True):
                yield (
                    f"bnb-{name}{bits}{'-paged' if paged else ''}",
                    Library(
                        make=_one("bitsandbytes.optim", f"{'Paged' if paged else ''}{attribute}{bits}"),
                        install="pip install 'simpletuner[bnb]'",
                        views=True,
                        lacks=_lacks_for_pages if paged else _lacks_for_bitsandbytes,
                    ),
                )


LIBRARIES: Mapping[str, Library] = {
    "optimi-lion": _optimi("Lion", betas=(0.9, 0.99), weight_decay=0.0),
    "optimi-stableadamw": _optimi("StableAdamW", views=True, clips=False),
    "optimi-adamw": _optimi("AdamW"),
    "optimi-adam": _optimi("Adam"),
    "optimi-radam": _optimi("RAdam"),
    "optimi-ranger": _optimi("Ranger"),
    "optimi-adan": _optimi("Adan"),
    "optimi-sgd": _optimi("SGD"),
    "torch-adam": Library(make=_one("torch.optim", "Adam", fused=True)),
    # Not fused: torch 2.13's fused SGD leaves most bf16 elements unchanged on a CPU.
    "torch-sgd": Library(make=_one("torch.optim", "SGD")),
    "torch-radam": Library(make=_one("torch.optim", "RAdam")),
    "torch-nadam": Library(make=_one("torch.optim", "NAdam")),
    "torch-adafactor": Library(make=_one("torch.optim", "Adafactor"), views=True),
    "ao-adamw8bit": _torchao("AdamW8bit"),
    "ao-adamw4bit": _torchao("AdamW4bit"),
    "ao-adamwfp8": _torchao("AdamWFp8", _lacks_for_fp8),
    **dict(_bitsandbytes()),
    "muon": Library(make=_muon, views=True),
    "prodigy": Library(
        make=_one("prodigyopt", "Prodigy"),
        install="pip install prodigyopt",
        clips=False,
        own_rate=1.0,
        counters=("k", "d", "d_max", "d_numerator"),
    ),
}
