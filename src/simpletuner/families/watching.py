"""Looking at a sampler while it works, without changing what it makes. training.md §7.1."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Watch:
    """`show(step, timestep, latents)` is called after each of `steps`, counted from 1.

    The latents are those that the sampler takes for clean now, in its own layout."""

    steps: frozenset[int]
    show: Callable[[int, float, Tensor], None]


@contextmanager
def watched(scheduler: Any, watch: Watch | None) -> Generator[None]:
    """`scheduler` is a diffusers sampler; a step that is not shown costs nothing, and waits for nothing."""
    if watch is None:
        yield
        return
    plain, count = scheduler.step, 0

    @wraps(plain)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **keys: Any):
        nonlocal count
        count += 1
        result = plain(model_output, timestep, sample, *args, return_dict=True, **keys)
        if count in watch.steps:
            watch.show(count, float(timestep), _clean(scheduler, model_output, timestep, sample, result))
        return result if return_dict else (result.prev_sample,)

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def _clean(scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor, result: Any) -> Tensor:
    """The sampler's own estimate where it keeps one, else the latents as they are now."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return sample - timestep / scheduler.config["num_train_timesteps"] * model_output
    if "pred_original_sample" in result and result.pred_original_sample is not None:
        return result.pred_original_sample
    kept = vars(scheduler).get("model_outputs")  # of the multistep solvers that work on clean estimates
    return kept[-1] if kept and kept[-1] is not None else result.prev_sample
