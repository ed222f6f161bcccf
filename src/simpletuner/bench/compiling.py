"""`bench compile`: what it costs to compile the repeated blocks of a denoiser, and how often that happens again."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from simpletuner.bench.device import release, seconds_of, wait
from simpletuner.bench.figure import Figure, Measured
from simpletuner.bench.scene import Scene
from simpletuner.bench.work import Job, Works, batch_of, jobs_for

BUCKETS = 12
MAX_RECOMPILES = 2
"""Per kind of block, training.md §10.1."""


def measure(
    scene: Scene, device: torch.device, jobs: Sequence[Job] | None = None, backend: str | None = None
) -> Measured:
    """Each job begins with nothing compiled in this process; what Inductor keeps on disk is not used either.

    `backend` of torch.compile: Inductor on a GPU. On a CPU its C++ takes a minute a graph: there they are only made
    and differentiated, with the same recompiles and breaks.
    """
    from torch._inductor.utils import fresh_cache

    backend = backend or ("inductor" if device.type == "cuda" else "aot_eager")
    works = Works(scene)
    found = Measured(benchmark="compile", figures=[])
    kinds_seen: set[frozenset[str]] = set()
    for job in jobs or jobs_for(device):
        # Another batch size is no other family.
        kinds = frozenset(works.block_kinds(job))
        if kinds in kinds_seen:
            continue
        kinds_seen.add(kinds)
        torch.compiler.reset()
        with fresh_cache():
            found.figures += _figures(works, job, device, backend)
        release(device)
    return found


def _figures(works: Works, job: Job, device: torch.device, backend: str) -> list[Figure]:
    from torch._dynamo.utils import counters

    plain = works.build(job, device)
    plain_s = seconds_of(plain.step, 1, device)
    del plain
    release(device)
    counters.clear()
    work = works.build(job, device, {"dynamo_backend": backend})
    started = time.perf_counter()
    work.step()
    wait(device)
    first_s = time.perf_counter() - started
    kinds, first = len(works.block_kinds(job)), _graphs()
    for size in buckets(max(job.size, 256)):
        work.loss(batch_of(job, work.family, work.denoiser, device, size)).backward()
    recompiles = (_graphs() - first) / kinds
    breaks = sum(counters["graph_break"].values())
    return [
        Figure(
            name=f"{job.name}: first step, compiling",
            value=first_s,
            unit="s",
            note=f"by {backend}; plain {plain_s:.3g} s",
        ),
        Figure(
            name=f"{job.name}: recompiles over {BUCKETS} buckets, per kind of block",
            value=recompiles,
            unit="",
            limit=f"≤ {MAX_RECOMPILES}",
            is_met=recompiles <= MAX_RECOMPILES,
            note=f"{kinds} kind(s), {first} graph(s) in the first step",
        ),
        Figure(name=f"{job.name}: graph breaks", value=breaks, unit="", limit="0", is_met=breaks == 0),
    ]


def _graphs() -> int:
    """Forward graphs that this process has compiled since its counters were cleared."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def buckets(base: int) -> list[tuple[int, int]]:
    """Sizes (width, height) about the area of a square of `base`, in steps of a sixteenth of it."""
    unit = base // 16
    widths = [unit * count for count in range(11, 11 + BUCKETS)]
    return [(width, round(base * base / width / unit) * unit) for width in widths]
