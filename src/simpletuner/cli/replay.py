"""`simpletuner replay`: the first steps of an earlier run once more, from its `run_lock.json`, and the same losses."""

from __future__ import annotations

import json as json_text
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from simpletuner.cli.scratch_folder import scratch_folder
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import JobDir
from simpletuner.jobs.scratch import Scratch
from simpletuner.run_lock import KEPT_LOSSES, LOCK, RunLock, first_losses, read_lock
from simpletuner.server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Replayed:
    lock: RunLock
    losses: list[str | None]
    """Of this time."""
    differences: list[str]
    """Of versions, device and configuration."""

    @property
    def wanted(self) -> list[str | None]:
        return self.lock.losses[: len(self.losses)]

    @property
    def first_difference(self) -> int | None:
        """Step from 1."""
        pairs = zip(self.wanted, self.losses, strict=True)
        return next((step for step, (one, other) in enumerate(pairs, 1) if one != other), None)


def replay(
    run: str,
    /,
    *,
    steps: int = 5,
    keep: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Run the first steps of a job again and compare every loss to the last bit.

    Exit code 0: equal, 65: the data changed, 70: other losses; versions and options that changed are named.

    Parameters
    ----------
    run
        A job's id, or the path of a run_lock.json.
    steps
        How many steps, at most 20.
    keep
        Keep the folder of the run.
    json
        Print JSON.
    """
    settings = ServerSettings.read({}, os.environ, Path.cwd())
    lock = find_lock(run, settings)
    steps = min(steps, len(lock.losses))
    if steps < 1:
        hint = f"--steps is at least 1 and at most {KEPT_LOSSES}; a run of no steps cannot be compared."
        raise UserError("nothing_to_replay", f"{run} has no losses to compare.", hint=hint)
    with scratch_folder(settings.state_dir, "replay", keep=keep) as folder:
        scratch = Scratch(folder, config=lock.config, datasets=lock.datasets, workspace=lock.workspace)
        length = {"checkpoint_step_interval": 0}
        accumulation = lock.config["gradient_accumulation_steps"]
        scratch.run(scratch.job("again", **length), (steps * accumulation, "cancel"))
        again = read_lock(folder / "again" / LOCK)
        losses = first_losses(folder / "again", steps)
        differences = lock.differences(again, ignore=scratch.overrides("again", **length))
    if changed := lock.changed_data(again):
        raise UserError(
            "dataset_changed",
            f"The run cannot be repeated: {'; '.join(changed)}.",
            hint="Put the pictures and captions back, or compare runs on the data of today.",
            exit_code=ExitCode.DATA,
        )
    found = Replayed(lock, losses, differences)
    _print(found, as_json=json)
    return ExitCode.DONE if found.first_difference is None else ExitCode.BUG


def find_lock(run: str, settings: ServerSettings) -> RunLock:
    """By job id under the server or in the foreground, or by path. Raises UserError `unknown_job` (64)."""
    if run.endswith(".json") or os.sep in run:
        return read_lock(Path(run))
    folders = [root / run for root in (settings.jobs_root, settings.foreground_root)]
    folder = next((folder for folder in folders if (folder / "spec.json").is_file()), None)
    if folder is None:
        message = f"There is no job {run} in {settings.state_dir}."
        raise UserError("unknown_job", message, hint=f"Name a job's id, or the path of a {LOCK}.")
    output_dir = Path(JobDir(folder).read_spec().output_dir)
    lock = read_lock(output_dir / LOCK)
    if run not in (lock.job_id, *lock.continued_by):
        message = f"{output_dir} was written by job {lock.job_id} since."
        raise UserError("run_lock_missing", message, hint=f"What {run} wrote down of itself is gone.")
    return lock


def _print(found: Replayed, *, as_json: bool) -> None:
    first = found.first_difference
    if as_json:
        row = {
            "equal": first is None,
            "job_id": found.lock.job_id,
            "steps": len(found.losses),
            "first_difference": first,
            "losses": found.losses,
            "expected": found.wanted,
            "changed": found.differences,
        }
        print(json_text.dumps(row, indent=2))
        return
    for step, (one, other) in enumerate(zip(found.wanted, found.losses, strict=True), 1):
        mark = "equal" if one == other else f"DIFFERS: {_shown(other)}"
        print(f"  step {step:<4} loss {_shown(one):<24} {mark}")
    if first is None:
        print(f"The first {len(found.losses)} losses of {found.lock.job_id} are the same, to the last bit.")
    else:
        print(f"The losses part at step {first}.")
    for difference in found.differences:
        print(f"  changed: {difference}")
    if first is not None and not found.differences:
        print("  Neither versions nor device nor options changed; the data is the same.")


def _shown(loss: str | None) -> str:
    return "not a number" if loss is None else repr(float.fromhex(loss))
