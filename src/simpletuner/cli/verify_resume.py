"""`simpletuner verify-resume`: that a killed run goes on as if it had lived, shown on an environment of one's own."""

from __future__ import annotations

import json as json_text
import random
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

from cyclopts import Parameter

from simpletuner.cli.local_config import print_warnings, read_local_config
from simpletuner.cli.scratch_folder import scratch_folder
from simpletuner.cli.words import LocalName
from simpletuner.config.resolve import freeze
from simpletuner.errors import ExitCode, UserError
from simpletuner.jobs.equality import Compared, compare_runs
from simpletuner.jobs.scratch import Scratch


@dataclass(slots=True)
class Verdict:
    steps: int
    seed: int
    deaths: list[int]
    """Micro-steps that were done when the run was killed, counted from its beginning."""
    resumed_from: list[str] = field(default_factory=list[str])
    compared: list[Compared] = field(default_factory=list[Compared])

    @property
    def equal(self) -> bool:
        return not any(row.difference for row in self.compared)


def verify_resume(
    env: LocalName,
    *words: Annotated[str, Parameter(show=False)],
    steps: int = 6,
    kills: int = 1,
    seed: int | None = None,
    keep: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train a few steps twice, once killed and resumed on the way, and compare everything byte for byte.

    The environment's caches are used and filled; its output folder is not touched. Exit code 0: equal, 70: not.

    Parameters
    ----------
    env
        Environment under the configs directory.
    steps
        Optimizer steps of each run.
    kills
        How many times the second run is killed, at random micro-steps after its first checkpoint.
    seed
        Where: the same number kills at the same micro-steps. Drawn and printed if it is not given.
    keep
        Keep the folder of both runs.
    json
        Print JSON.
    """
    local = read_local_config(env, words)
    print_warnings(local.resolution.warnings)
    config, _, datasets = freeze(local.resolution)
    chosen = random.SystemRandom().randrange(2**31) if seed is None else seed
    accumulation = config["gradient_accumulation_steps"]
    interval = max(1, steps // 3)
    verdict = Verdict(steps, chosen, draw_deaths(chosen, steps, accumulation, interval, kills))
    with scratch_folder(local.settings.state_dir, "verify-resume", keep=keep) as folder:
        scratch = Scratch(folder, config=config, datasets=datasets, workspace=str(local.settings.workspace))
        _run(scratch, verdict, accumulation, interval)
        verdict.compared = compare_runs(folder / "whole", folder / "killed")
    _print(verdict, as_json=json)
    return ExitCode.DONE if verdict.equal else ExitCode.BUG


def draw_deaths(seed: int, steps: int, accumulation: int, interval: int, kills: int) -> list[int]:
    """Micro-steps done at each death, ascending: behind the first checkpoint, before the last micro-step.

    Raises UserError `too_few_steps` (64).
    """
    points = range(interval * accumulation + 1, steps * accumulation)
    if not 0 < kills <= len(points):
        raise UserError(
            "too_few_steps",
            f"{steps} steps of {accumulation} micro-steps leave {len(points)} places to be killed at, not {kills}.",
            hint="Raise --steps, or lower --kills to 1 at least.",
        )
    return sorted(random.Random(seed).sample(points, kills))


def _run(scratch: Scratch, verdict: Verdict, accumulation: int, interval: int) -> None:
    length: dict[str, Any] = {
        "max_train_steps": verdict.steps,
        "num_train_epochs": 0,
        "checkpoint_step_interval": interval,
        "checkpoints_total_limit": 1,
    }
    _say(f"{verdict.steps} steps in one go, a checkpoint every {interval}")
    scratch.run(scratch.job("whole", **length))
    _say(f"The same again with kill -9, --seed {verdict.seed}")
    start = 0
    for done in verdict.deaths:
        scratch.run(scratch.job("killed", **length), (done - start + 1, "kill"))
        # What is lost is what came after the last checkpoint: the next start does it again.
        step = done // accumulation // interval * interval
        start = step * accumulation
        verdict.resumed_from.append(f"checkpoint-{step}")
        _say(f"  killed after micro-step {done} of {verdict.steps * accumulation}; goes on from checkpoint-{step}")
    scratch.run(scratch.job("killed", **length))


def _say(text: str) -> None:
    """On stderr, where it does not disturb JSON."""
    print(text, file=sys.stderr, flush=True)


def _print(verdict: Verdict, *, as_json: bool) -> None:
    if as_json:
        row = {
            "equal": verdict.equal,
            "steps": verdict.steps,
            "seed": verdict.seed,
            "killed_after_micro_steps": verdict.deaths,
            "resumed_from": verdict.resumed_from,
            "compared": [part.as_dict() for part in verdict.compared],
        }
        print(json_text.dumps(row, indent=2))
        return
    for part in verdict.compared:
        mark = f"DIFFERS: {part.difference}" if part.difference else "equal"
        print(f"  {part.part:<36} {part.name:<52} {mark}")
    if verdict.equal:
        print("Equal, byte for byte.")
    else:
        print(
            "Not equal. On a GPU, look for kernels that are not deterministic; else please report it.", file=sys.stderr
        )
