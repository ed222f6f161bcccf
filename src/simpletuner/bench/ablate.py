"""`bench ablate`: each technique on and off, in alternating blocks of the same step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from simpletuner.bench.device import peak_bytes, release, seconds_of
from simpletuner.bench.figure import Figure, Measured, lower_bound
from simpletuner.bench.scene import Scene
from simpletuner.bench.work import Job, Options, Work, Works, jobs_for
from simpletuner.train.attention import FUSED, has_kernel

BLOCK = 3
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Technique:
    """`on`: options beside the job's. `prepare`: what else is done to the step once it is built."""

    name: str
    on: Options = field(default_factory=dict[str, Any])
    prepare: Callable[[Work], None] = lambda work: None
    is_for: Callable[[Job], bool] = lambda job: True


def _is_full(job: Job) -> bool:
    return job.options["model_type"] == "full"


def _has_frozen_base(job: Job) -> bool:
    return not _is_full(job)


TECHNIQUES = (
    Technique("recomputing", {"gradient_checkpointing": True}),
    Technique(
        "recomputing, attention kept", {"gradient_checkpointing": True, "gradient_checkpointing_keeps": "attention"}
    ),
    Technique("blocks compiled", {"dynamo_backend": "inductor"}),
    Technique("optimizer compiled", prepare=lambda work: work.compile_optimizer("inductor"), is_for=_is_full),
    Technique(
        "fp32, torch's fused optimizer",
        {"base_model_precision": "fp32", "base_model_default_dtype": "fp32", "optimizer": "torch-adamw"},
        is_for=_is_full,
    ),
    *(
        Technique(f"frozen base in {name}", {"base_model_precision": name}, is_for=_has_frozen_base)
        for name in ("int8-quanto", "int8-torchao")
    ),
)


def techniques_for(device: torch.device) -> tuple[Technique, ...]:
    """With each kernel of attention that the device has, against torch's own choice."""
    kernels = [name for name in FUSED if has_kernel(name, device, torch.bfloat16)]
    return (*TECHNIQUES, *(Technique(f"attention by {name}", {"attention_mechanism": name}) for name in kernels))


def measure(
    scene: Scene,
    steps: int,
    device: torch.device,
    jobs: Sequence[Job] | None = None,
    techniques: Sequence[Technique] | None = None,
) -> Measured:
    """`steps` of the plain step and of each with a technique, which fit into memory beside each other or are left out.

    The plain step keeps its activations, is not compiled and is in bf16; its optimizer runs as plain operations.
    """
    works = Works(scene)
    found = Measured(benchmark="ablate", figures=[])
    for job in jobs or jobs_for(device):
        for technique in techniques or techniques_for(device):
            if not technique.is_for(job):
                continue
            name = f"{job.name}: {technique.name}"
            try:
                found.figures += _compare(works, job, technique, name, max(1, steps // BLOCK), device)
            except torch.OutOfMemoryError as error:
                found.details[name] = {"out_of_memory": str(error)}
            release(device)
    return found


def _compare(
    works: Works, job: Job, technique: Technique, name: str, num_blocks: int, device: torch.device
) -> Iterator[Figure]:
    off, on = works.build(job, device), works.build(job, device, technique.on)
    off.plain_optimizer()
    if not technique.on.get("optimizer"):
        on.plain_optimizer()
    technique.prepare(on)
    for work in (off, on):
        seconds_of(work.step, WARM_UP, device)
    plain: list[float] = []
    changed: list[float] = []
    for number in range(num_blocks):
        order = ((off, plain), (on, changed))
        for work, times in order if number % 2 == 0 else reversed(order):
            times.append(seconds_of(work.step, BLOCK, device))
    ratios = [a / b for a, b in zip(changed, plain, strict=True)]
    yield Figure(
        name=f"{name}, time on ÷ off",
        value=statistics.median(ratios),
        unit="",
        least=min(ratios),
        most=max(ratios),
        note=f"{statistics.median(changed) * 1e3:.4g} ÷ {statistics.median(plain) * 1e3:.4g} ms, {num_blocks} pair(s) "
        f"of blocks of {BLOCK}; 95 % lower bound {lower_bound(ratios):.4f}",
    )
    with_it, without = peak_bytes(on), peak_bytes(off)
    if with_it is None or without is None:
        return
    # On a GPU the allocator holds both steps: what the other one holds at rest is in both figures.
    note = f"{with_it / 1e9:.4g} ÷ {without / 1e9:.4g} GB"
    yield Figure(name=f"{name}, peak on ÷ off", value=with_it / without, unit="", note=note)
