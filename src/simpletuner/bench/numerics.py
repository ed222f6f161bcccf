"""Loss curves of each way to save time or memory against the plain way: same batches, same noise, same seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from simpletuner.bench.figure import Figure, Measured
from simpletuner.bench.memory import PAIRED, write_datasets
from simpletuner.bench.scene import Scene
from simpletuner.bench.trainer import TrainerLoop

STEPS = 200
WINDOWS = 10

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`tolerance`: of the means of a tenth of the curves, relative to the plain one."""

    name: str
    plain: Options
    fast: Options
    tolerance: float


_FULL: Options = {"learning_rate": 1e-4, "gradient_checkpointing": False}
_FP32: Options = _FULL | {"base_model_precision": "fp32", "base_model_default_dtype": "fp32"}
_LORA: Options = PAIRED | {"learning_rate": 1e-3, "gradient_checkpointing": False}
COMPARISONS = (
    Comparison("recomputing ÷ keeping, PixArt bf16", _FULL, _FULL | {"gradient_checkpointing": True}, 1e-3),
    Comparison("bf16 with stochastic rounding ÷ fp32, PixArt", _FP32, _FULL, 0.02),
    Comparison("int8-quanto ÷ bf16 base, Flux LoRA", _LORA, _LORA | {"base_model_precision": "int8-quanto"}, 0.02),
)


def measure(scene: Scene, steps: int = STEPS, comparisons: Sequence[Comparison] = COMPARISONS) -> Measured:
    """`steps` of every run; a run that several comparisons share is made once."""
    write_datasets(scene)
    curves: dict[str, list[float]] = {}
    figures: list[Figure] = []
    for comparison in comparisons:
        plain, fast = (_curve(scene, options, steps, curves) for options in (comparison.plain, comparison.fast))
        figures.append(figure(comparison, plain, fast))
    return Measured(benchmark="numerics", figures=figures, details={"loss": curves})


def _curve(scene: Scene, options: Options, steps: int, known: dict[str, list[float]]) -> list[float]:
    key = json.dumps(options, sort_keys=True)
    if key not in known:
        with scene.run("bf16", f"curve-{len(known)}", **options) as built:
            built.metrics.start()
            TrainerLoop(built.run).run(steps)
            built.metrics.drain()
            lines = (built.inspection.output_dir / "training_metrics.jsonl").read_text().splitlines()
        known[key] = [json.loads(line)["loss"] for line in lines]
        assert len(known[key]) == steps
    return known[key]


def figure(comparison: Comparison, plain: Sequence[float], fast: Sequence[float]) -> Figure:
    """The tenth of the curves in which they are furthest apart."""
    ends = [len(plain) * number // WINDOWS for number in range(WINDOWS + 1)]
    ratios = [
        statistics.fmean(fast[start:end]) / statistics.fmean(plain[start:end])
        for start, end in pairwise(ends)
        if end > start
    ]
    furthest = max(ratios, key=lambda ratio: abs(ratio - 1))
    return Figure(
        name=f"loss, {comparison.name}",
        value=furthest,
        unit="",
        least=min(ratios),
        most=max(ratios),
        limit=f"1 ± {comparison.tolerance:g}",
        is_met=abs(furthest - 1) <= comparison.tolerance,
        note=f"{len(plain)} steps, means of tenths; the plain one from {statistics.fmean(plain[: ends[1]]):.4f} "
        f"to {statistics.fmean(plain[ends[-2] :]):.4f}",
    )
