"""Resuming a run: how it finds a checkpoint, whether it may go on from there, and what is loaded. training.md §6."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file

from simpletuner import __version__
from simpletuner.checkpoints import (
    CheckpointFolder,
    find_faults,
    list_checkpoints,
)
from simpletuner.config.train_config import TrainConfig
from simpletuner.errors import ExitCode, UserError
from simpletuner.train.report import Reporter
from simpletuner.train.state import TrainState, restore_rng, seed_generators
from simpletuner.train.stored import StoredTensors
from simpletuner.train.trained import Trained
from simpletuner.train.update import Update

OPTIMIZER = "optimizer-rank0.safetensors"
"""Every rank has the same."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    folder: CheckpointFolder
    state: TrainState
    record: dict[str, Any]


def find_resume_point(
    option: str | None, output_dir: Path, reporter: Reporter, *, own_job: str | None = None
) -> ResumePoint | None:
    """The checkpoint that `resume_from_checkpoint` means, verified byte for byte; None for a fresh start.

    `own_job`: the job goes on that was launched before: its own latest checkpoint is meant, if it has one already.

    Raises UserError `checkpoint_not_found` (64) when one was named and is not there or not whole.
    """
    if own_job is not None and (own := _find_latest(output_dir, reporter, own_job)) is not None:
        return own
    if option is None:
        return None
    if option == "latest":
        return _find_latest(output_dir, reporter)
    path = Path(option) if Path(option).is_absolute() else output_dir / option
    named = [folder for folder in list_checkpoints(path.parent) if folder.path == path]
    faults = find_faults(path) if named else [f"{path} does not exist"]
    if faults:
        raise UserError(
            "checkpoint_not_found",
            f"The checkpoint {option!r} cannot be resumed: {'; '.join(faults[:3])}.",
            hint=_listing(output_dir),
            pointer="/--resume_from_checkpoint",
        )
    return _point(named[0])


def _find_latest(output_dir: Path, reporter: Reporter, own_job: str | None = None) -> ResumePoint | None:
    for folder in list_checkpoints(output_dir):
        faults = find_faults(folder.path)
        if not faults and own_job in (None, folder.read_state().get("job_id")):
            return _point(folder)
        if not faults:
            continue
        message = f"{folder.name} is broken and is not used: {'; '.join(faults[:3])}."
        reporter.warn("checkpoint_broken", message, hint="An older one is tried.")
    if own_job is None:
        reporter.notify("fresh_start", "There is no checkpoint to resume: the run starts at step 0.")
    return None


def read_point(path: Path) -> ResumePoint:
    """Of a checkpoint that this run made or resumed, and has not touched since."""
    return _point(next(folder for folder in list_checkpoints(path.parent) if folder.path == path))


def _point(folder: CheckpointFolder) -> ResumePoint:
    record = folder.read_state()
    return ResumePoint(folder, TrainState.from_dict(record), record)


def _listing(output_dir: Path) -> str:
    names = [folder.name for folder in list_checkpoints(output_dir) if folder.manifest is not None]
    return f"Complete ones in {output_dir}: {', '.join(names) or 'none'}."


def load_checkpoint(
    point: ResumePoint, trained: Trained, update: Update, device: torch.device, *, rank: int, seed: int
) -> None:
    """Weights, optimizer, moving average and the generators of `rank`: seeded anew if it was not there before.

    Raises UserError `resume_incompatible`.
    """
    if point.record["layout"] != update.layout:
        raise UserError(
            "resume_incompatible",
            f"{point.folder.name} was made by a run that trains other weights.",
            hint="Choose another --output_dir, or set --resume_from_checkpoint to nothing.",
            pointer="/--resume_from_checkpoint",
        )
    trained.load(point.folder.path)
    update.load_state(StoredTensors(point.folder.path / OPTIMIZER, device))
    generators = point.folder.path / rng_file(rank)
    if generators.exists():
        restore_rng(load_file(generators))
    else:
        seed_generators(seed)


def rng_file(rank: int) -> str:
    return f"rng-rank{rank}.safetensors"


def run_facts(config: TrainConfig, data_fingerprint: str, job_id: str, num_processes: int) -> dict[str, Any]:
    """What a checkpoint says of its run, and what a resumed run is compared with."""
    base = config.precision.base_model_precision
    return {
        "job_id": job_id,
        "family": config.model.model_family,
        "model_type": config.model.model_type,
        "lora_type": config.adapter.lora_type if config.model.model_type == "lora" else None,
        "base": [config.model.pretrained_model_name_or_path, config.model.revision, base],
        "optimizer": config.optimizer.optimizer,
        "use_ema": config.precision.use_ema,
        "fsdp_enable": config.fsdp.fsdp_enable or None,
        "batch_layout": {
            "train_batch_size": config.run.train_batch_size,
            "gradient_accumulation_steps": config.run.gradient_accumulation_steps,
            "num_processes": num_processes,
        },
        "seed": config.run.seed,
        "data": data_fingerprint,
    }


def check_resume(point: ResumePoint, facts: Mapping[str, Any], config: TrainConfig, reporter: Reporter) -> bool:
    """Whether the run goes on exactly. Raises UserError `resume_incompatible` for what cannot go on at all."""
    record = point.record
    for name in ("family", "model_type", "lora_type", "optimizer", "use_ema", "fsdp_enable"):
        # Checkpoints from before there were adapters do not say `lora_type`, nor `fsdp_enable` without it.
        if record.get(name) != facts[name]:
            raise UserError(
                "resume_incompatible",
                f"{point.folder.name} was made with {name} {record.get(name)!r}, this run has {facts[name]!r}.",
                hint="Choose another --output_dir, or set --resume_from_checkpoint to nothing.",
                pointer=f"/--{'model_family' if name == 'family' else name}",
            )
    changed = [name for name in ("batch_layout", "seed", "data") if record[name] != facts[name]]
    if "data" in changed and not config.checkpoint.override_dataset_config:
        raise UserError(
            "dataset_changed",
            f"The data is not what it was when {point.folder.name} was saved.",
            hint="Set --override_dataset_config true to go on with the changed data.",
            pointer="/--override_dataset_config",
            exit_code=ExitCode.DATA,
        )
    if changed:
        message = f"The run goes on at the same number of samples, but not exactly: {', '.join(changed)} changed."
        reporter.warn("resume_not_exact", message, changed=changed)
    return not changed


def versions() -> dict[str, str]:
    return {
        "simpletuner": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "cpus": str(os.cpu_count()),
    }
