"""The kernels that attention may take in a run. A choice by measuring belongs to the run: a resumed one keeps it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from simpletuner.config.train_config import TrainConfig
from simpletuner.data.manifest import Manifest
from simpletuner.families.spec import FamilySpec
from simpletuner.families.weights import autocast_dtype, weight_dtype
from simpletuner.train.attention import check_kernel, fastest_first
from simpletuner.train.checkpoint import ResumePoint
from simpletuner.train.ranks import Ranks
from simpletuner.train.rehearsal import Rehearsal, Shapes
from simpletuner.train.report import Reporter

KERNEL_ORDER = "attention_kernels"
"""Key of the order in a checkpoint's record."""


def choose_kernels(
    config: TrainConfig,
    spec: FamilySpec,
    manifests: Mapping[str, Manifest],
    device: torch.device,
    ranks: Ranks,
    reporter: Reporter,
    point: ResumePoint | None,
) -> tuple[str, ...] | None:
    """The order in which they are asked, on a GPU by what the largest micro-step takes; None where nobody chose.

    A CPU has one fused kernel. Raises UserError `attention_unavailable` (69) for a forced one that is not there.
    """
    forced = config.compute.attention_mechanism
    if forced != "diffusers":
        check_kernel(forced, device, autocast_dtype(config) or weight_dtype(config))
        return None
    if device.type != "cuda":
        return None
    if point is not None and KERNEL_ORDER in point.record:
        return tuple(point.record[KERNEL_ORDER])
    chosen: tuple[str, ...] = ()
    if ranks.is_main:
        trained = [manifests[entry.id] for entry in config.image_datasets]
        calls = Rehearsal(config, spec, Shapes.of(trained, config)).attention_calls()
        timed = fastest_first(calls, device)
        chosen = tuple(timed)
        told = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in timed.items() if seconds is not None)
        reporter.notify("attention_kernels", f"Kernels of attention, forward and backward: {told}.", order=list(chosen))
    return ranks.share(chosen)
