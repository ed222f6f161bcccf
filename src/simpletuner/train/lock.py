"""Writes down what a run is made of, before its first step."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from simpletuner.config.train_config import TrainConfig, option_fields
from simpletuner.errors import UserError
from simpletuner.job import JobDir
from simpletuner.run_lock import LOCK, DataFacts, RunLock, first_losses, read_lock, write_lock
from simpletuner.train.checkpoint import versions
from simpletuner.train.inputs import Inputs

_LIBRARIES = ("numpy", "safetensors", "pillow", "peft", "lycoris-lora", "torch-optimi", "torchao", "bitsandbytes")
"""What may change a number, beside what a checkpoint names."""


def begin_lock(job: JobDir, config: TrainConfig, inputs: Inputs, device: torch.device, *, resumed: bool) -> None:
    """A run that goes on keeps the lock of the one that made the first step, and adds its own name."""
    spec = job.read_spec()
    output_dir = Path(spec.output_dir)
    earlier = _read_if_whole(output_dir / LOCK) if resumed else None
    if earlier is not None:
        write_lock(output_dir, earlier.model_copy(update={"continued_by": [*earlier.continued_by, spec.job_id]}))
        return
    secret = {option.name for option in option_fields().values() if option.ui.secret}
    provenance = job.read_config()["provenance"]
    lock = RunLock(
        job_id=spec.job_id,
        workspace=spec.workspace,
        config=config.without_secrets(),
        provenance={name: origin for name, origin in provenance.items() if name not in secret},
        datasets=job.read_datasets(),
        data=_data_facts(inputs),
        versions=versions() | _library_versions(),
        seed=config.run.seed or 0,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        losses=first_losses(output_dir) if resumed else [],
    )
    write_lock(output_dir, lock)


def complete_lock(output_dir: Path) -> None:
    """With the losses of the first steps, now that they are known."""
    lock = read_lock(output_dir / LOCK)
    write_lock(output_dir, lock)


def _read_if_whole(path: Path) -> RunLock | None:
    """What was done to this file must not keep a run from going on."""
    try:
        return read_lock(path)
    except UserError:
        return None


def _data_facts(inputs: Inputs) -> dict[str, DataFacts]:
    names = [entry.id for entry in inputs.config.image_datasets]
    return {
        name: DataFacts(fingerprint=inputs.fingerprint(only=name), kept=len(inputs.manifests[name].kept))
        for name in names
    }


def _library_versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
