"""`bench step`: time, pictures and FLOPs per second, and the peak of memory of a training step of each job."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

from simpletuner.bench.device import peak_bytes, release, seconds_of
from simpletuner.bench.figure import Figure, Measured
from simpletuner.bench.scene import Scene
from simpletuner.bench.work import Job, Works, jobs_for

WARM_UP = 3
BLOCK = 5


def measure(scene: Scene, steps: int, device: torch.device, jobs: Sequence[Job] | None = None) -> Measured:
    """`steps` of each job in blocks, of which each is waited for once. The jobs are those of the device by default."""
    works = Works(scene)
    found = Measured(benchmark="step", figures=[])
    for job in jobs or jobs_for(device):
        try:
            found.figures += _figures(works, job, steps, device)
        except torch.OutOfMemoryError as error:
            found.details[job.name] = {"out_of_memory": str(error)}
        release(device)
    return found


def _figures(works: Works, job: Job, steps: int, device: torch.device) -> Iterator[Figure]:
    tflop = works.flops(job) / 1e12
    work = works.build(job, device)
    seconds_of(work.step, WARM_UP, device)
    blocks = [seconds_of(work.step, BLOCK, device) for _ in range(max(1, steps // BLOCK))]
    middle = statistics.median(blocks)
    goal = "" if job.must_ms is None else f"; one H100 must ≤ {job.must_ms:g} ms"
    yield Figure(
        name=f"{job.name}: step",
        value=middle * 1e3,
        unit="ms",
        least=min(blocks) * 1e3,
        most=max(blocks) * 1e3,
        note=f"{len(blocks)} block(s) of {BLOCK}, {job.size} px, {work.tokens} latent tokens, not recomputed, "
        f"{work.config.precision.base_model_precision}{goal}",
    )
    yield Figure(name=f"{job.name}: pictures", value=job.batch / middle, unit="/s")
    note = f"{tflop:.4g} TFLOP of the model in a step, counted; optimizer and clipping in the time"
    yield Figure(name=f"{job.name}: model speed", value=tflop / middle, unit="TFLOP/s", note=note)
    kind = "allocated" if device.type == "cuda" else "tensors of a step, counted"
    if (peak := peak_bytes(work)) is not None:
        yield Figure(name=f"{job.name}: peak memory", value=peak / 1e9, unit="GB", note=kind)
