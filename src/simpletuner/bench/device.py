"""The device that the GPU rows are of: which, its name, and how its time and memory are taken."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from simpletuner.bench.work import Work
from simpletuner.families.precision import plain_tensors
from simpletuner.train.meter import Meter

Asked = Literal["auto", "cpu", "cuda"]


def choose(asked: Asked) -> torch.device:
    """`auto`: a GPU where there is one. Raises ValueError for a GPU that is not there."""
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise ValueError("There is no CUDA device here: --device cpu runs the same rows on nano models.")
    return torch.device("cuda" if has_gpu and asked != "cpu" else "cpu")


def seconds_of(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Of one of `times` calls in a row; waited for before and after all of them, not in between."""
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - started) / times


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Work) -> int | None:
    """Of one step: what the allocator of a GPU gave out at most; on a CPU the tensors alive at once, as counted.

    None on a CPU for what is compiled: torch compiles nothing while tensors are counted.
    """
    if work.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(work.device)
        work.step()
        wait(work.device)
        return torch.cuda.max_memory_allocated(work.device)
    if work.is_compiled:
        return None
    with Meter(FakeTensorMode()) as meter:
        for tensor in (*work.denoiser.parameters(), *work.held_tensors()):
            for plain in plain_tensors(tensor):
                plain.detach()  # an operation, so that its storage is seen
        work.step()
    return meter.peak_bytes


def release(device: torch.device) -> None:
    """What nobody holds any more, to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
