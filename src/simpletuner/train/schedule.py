"""Learning rate as a pure function of the step. training.md §5."""

from __future__ import annotations

import math

from simpletuner.config.training_options import OptimizerOptions


def learning_rate(options: OptimizerOptions, step: int, total: int) -> float:
    """Rate of the 0-based `step` of `total`: linear warm-up, then the schedule down to `lr_end` at the last step."""
    base, end, warmup = options.learning_rate, options.lr_end, options.lr_warmup_steps
    kind = options.lr_scheduler
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    span = total - 1 - warmup
    done = min(1.0, (step - warmup) / span) if span > 0 else 0.0
    match kind:
        case "constant" | "constant_with_warmup":
            return base
        case "linear":
            return end + (base - end) * (1 - done)
        case "cosine":
            return end + (base - end) * 0.5 * (1 + math.cos(math.pi * done))
        case "polynomial":
            return end + (base - end) * (1 - done) ** options.lr_power
        case "cosine_with_restarts":
            within = 1.0 if done == 1.0 else math.fmod(done * options.lr_num_cycles, 1.0)
            return end + (base - end) * 0.5 * (1 + math.cos(math.pi * within))
        case "sine":
            return end + (base - end) * 0.5 * (1 + math.cos(2 * math.pi * done * options.lr_num_cycles))
