"""The memory that is predicted against the memory that is used, over twelve configurations of the nano models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode

from simpletuner.bench.figure import Figure, Measured
from simpletuner.bench.scene import Scene
from simpletuner.bench.trainer import TrainerLoop
from simpletuner.events import EventType, read_journal
from simpletuner.families.precision import plain_tensors
from simpletuner.job import JobDir
from simpletuner.train.build import Built
from simpletuner.train.meter import Meter

MAX_COUNTED = 0.08
"""training.md §11, 60."""
LEAST_RATIO, MOST_RATIO = 0.85, 1.10
"""training.md §10.2."""
WARM_UP = 2

Options = dict[str, Any]
_LORA: Options = {"model_type": "lora", "lora_rank": 4}
_PIXART: dict[str, Options] = {
    "plain": {"gradient_checkpointing": False},
    "recomputed": {},
    "average of weights": {"use_ema": True},
    "batch 8": {"train_batch_size": 8},
    "fp32": {"base_model_precision": "fp32", "base_model_default_dtype": "fp32", "optimizer": "torch-adamw"},
    "lora": _LORA,
    "lora plain": _LORA | {"gradient_checkpointing": False},
}
_FLUX: dict[str, Options] = {
    "lora": {},
    "lycoris": {"lora_type": "lycoris"},
    "lora plain": {"gradient_checkpointing": False},
    "int8-quanto": {"base_model_precision": "int8-quanto"},
    "int8-torchao plain": {"base_model_precision": "int8-torchao", "gradient_checkpointing": False},
}
_BASE: Options = {"gradient_checkpointing": True, "data_backend_config": "long.json"}
PAIRED: Options = _LORA | {"model_family": "flux", "optimizer": "torch-adamw", "data_backend_config": "pairs.json"}
CONFIGURATIONS: dict[str, Options] = {
    **{f"PixArt {name}": _BASE | options for name, options in _PIXART.items()},
    **{f"Flux {name}": _BASE | PAIRED | options for name, options in _FLUX.items()},
}
_PROMPT = "a red heart on white paper, " * 100
"""Longer than any encoder reads: it is for captions of full length that memory is predicted."""


@dataclass(frozen=True, slots=True)
class BytesFound:
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def measure(scene: Scene, names: Sequence[str] = tuple(CONFIGURATIONS)) -> Measured:
    """Of each configuration one step counted in this process, then a run of its own from start to export."""
    write_datasets(scene)
    counted: dict[str, BytesFound] = {}
    resident: dict[str, BytesFound] = {}
    for name in names:
        slug = name.replace(" ", "-")
        with scene.run("bf16", f"{slug}-counted", **CONFIGURATIONS[name]) as built:
            counted[name] = BytesFound(built.memory.phases["step"], counted_bytes(built))
        options = {"base_model_default_dtype": "bf16", "max_train_steps": 5} | CONFIGURATIONS[name]
        resident[name] = _run(scene.job(f"{slug}-resident", **options))
    return Measured(
        benchmark="memory",
        figures=[
            figure("tensors of a step, predicted ÷ counted", counted, 1 - MAX_COUNTED, 1 + MAX_COUNTED),
            figure("peak RSS of a run, predicted ÷ measured", resident, LEAST_RATIO, MOST_RATIO),
        ],
        details={
            kind: {name: asdict(found) | {"ratio": found.ratio} for name, found in some.items()}
            for kind, some in (("counted", counted), ("resident", resident))
        },
    )


def write_datasets(scene: Scene) -> None:
    """The scene's pictures with a long caption; and as references of what they are in grey."""
    pictures, grey = scene.root / "pictures", scene.root / "grey"
    grey.mkdir()
    for path in sorted(pictures.iterdir()):
        with Image.open(path) as picture:
            ImageOps.grayscale(picture).convert("RGB").save(grey / path.name)
    captioned = {"resolution": 64, "caption_strategy": "instanceprompt", "instance_prompt": _PROMPT}
    reference = {"dataset_type": "conditioning", "conditioning_type": "reference_strict", "resolution": 64}
    _write(scene.root / "long.json", [{"id": "long", "instance_data_dir": "pictures"} | captioned])
    pairs = [
        {"id": "edit", "instance_data_dir": "grey", "conditioning_data": ["reference"]} | captioned,
        {"id": "reference", "instance_data_dir": "pictures"} | reference,
    ]
    _write(scene.root / "pairs.json", pairs)


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(entries))


def counted_bytes(built: Built) -> int:
    """Peak of the tensors that are alive in one step of the trainer, weights and optimizer included."""
    trainer = TrainerLoop(built.run)
    built.metrics.start()
    trainer.run(WARM_UP)
    meter = Meter(FakeTensorMode())

    def start() -> None:
        meter.__enter__()
        for parameter in built.run.denoiser.parameters():
            for tensor in (*plain_tensors(parameter), *([] if parameter.grad is None else [parameter.grad])):
                tensor.detach()  # an operation, so that its storage is seen
        for tensor in (*built.run.update.state_tensors().values(), *built.run.update.gradients):
            tensor.detach()

    def stop() -> None:
        meter.__exit__(None, None, None)

    trainer.run(1, before=start, after=stop)
    return meter.peak_bytes


def _run(job: JobDir) -> BytesFound:
    """A trainer of its own, and what it says at its end."""
    words = [sys.executable, "-m", "simpletuner.train", str(job.root)]
    subprocess.run(words, check=True, cwd=job.root, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    events = [json.loads(line) for _, line in read_journal(job.journal_path)]
    (data,) = [event["data"] for event in events if event["type"] == EventType.TRAINING_SUMMARY]
    return BytesFound(data["memory_predicted_bytes"], data["memory_peak_bytes"])


def figure(name: str, found: dict[str, BytesFound], least: float, most: float) -> Figure:
    """The configuration that is furthest off."""
    ratios = {configuration: some.ratio for configuration, some in found.items()}
    furthest = max(ratios, key=lambda configuration: abs(ratios[configuration] - 1))
    bytes_ = found[furthest]
    return Figure(
        name=name,
        value=ratios[furthest],
        unit="",
        least=min(ratios.values()),
        most=max(ratios.values()),
        limit=f"{least:.2f} – {most:.2f}",
        is_met=all(least <= ratio <= most for ratio in ratios.values()),
        note=f"furthest of {len(found)}: {furthest}, {bytes_.predicted / 1e6:.1f} ÷ {bytes_.measured / 1e6:.1f} MB",
    )
