"""The optimizers of other libraries: torch, torch-optimi, torchao, bitsandbytes, prodigyopt, schedulefree,
pytorch_optimizer. training.md §5. Adding one is one entry in `LIBRARIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn

Make = Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]


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
    in_fp32: bool = False
    """It rounds away small updates of bf16 weights: it is given an fp32 copy of them, which the state keeps."""
    averages: bool = False
    """It averages the weights in place of a schedule: after the warm-up the rate stays, and the average is the result.
    Its `eval` and `train` put the one and the other in place."""


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


def _schedule_free(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """The library's own warm-up is off: it weighs each step by its rate squared, and our rates rise as it would."""
    made = _one("schedulefree", "AdamWScheduleFree")(parameters)
    for optimizer in made:
        cast(Any, optimizer).train()
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


def _optimi(attribute: str, *, views: bool = False, clips: bool = True) -> Library:
    return Library(make=_one("optimi", attribute), install="pip install torch-optimi", views=views, clips=clips)


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
    "adamw_schedulefree": Library(
        make=_schedule_free,
        install="pip install schedulefree",
        counters=("k", "weight_sum", "lr_max"),
        in_fp32=True,
        averages=True,
    ),
    # Its first step only looks at the gradients (arXiv:2409.11321, as in the authors' code).
    "soap": Library(
        make=_one("pytorch_optimizer", "SOAP"),
        install="pip install pytorch_optimizer",
        views=True,
        counters=("step",),
        in_fp32=True,
    ),
}
