"""What is measured: a real run of the nano PixArt, over pictures drawn for it, with caches of the real builder."""

from __future__ import annotations

import json
import random
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from simpletuner.config.directories import Directories
from simpletuner.config.resolve import Resolution, freeze, resolve
from simpletuner.config.sources import layer_from_mapping
from simpletuner.config.train_config import TrainConfig, option_fields
from simpletuner.job import JobDir, JobSpec
from simpletuner.train.build import Built, build_run
from simpletuner.train.report import Reporter
from simpletuner.train.requests import RequestReader

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
BATCH_SIZE = 4

OPTIONS: dict[str, Any] = {
    "model_family": "pixart_sigma",
    "model_flavour": "nano",
    "max_train_steps": 1_000_000,
    "num_train_epochs": 0,
    "train_batch_size": BATCH_SIZE,
    "optimizer": "adamw_bf16",
    "learning_rate": 1e-6,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "seed": 1,
    "caption_dropout_probability": 0.0,
    "gradient_checkpointing": False,
    "mixed_precision": "no",
    "disable_benchmark": True,
    "validation_disable": True,
    "validation_step_interval": 0,
    "checkpoint_step_interval": 0,
    "output_dir": "output",
    "data_backend_config": "datasets.json",
}


class Scene:
    """A workspace with `num_pictures` pictures of one bucket and one caption: every batch has the same shape."""

    def __init__(self, root: Path, num_pictures: int) -> None:
        self.root = root
        self.num_pictures = num_pictures
        draw_pictures(root / "pictures", num_pictures)
        entry = {
            "id": "drawn",
            "instance_data_dir": "pictures",
            "resolution": 64,
            "caption_strategy": "instanceprompt",
            "instance_prompt": "red heart",
        }
        (root / "datasets.json").write_text(json.dumps([entry]))

    def config(self, **options: Any) -> TrainConfig:
        return self._resolve(options).require()

    def job(self, name: str, **options: Any) -> JobDir:
        """Frozen, ready to be run."""
        config, provenance, datasets = freeze(self._resolve(options))
        spec = JobSpec(
            job_id=f"bench-{name}",
            workspace=str(self.root),
            config_dir=str(self.root),
            output_dir=str(self.root / f"output-{name}"),
        )
        return JobDir.create(
            self.root / "jobs" / spec.job_id, spec, config=config, provenance=provenance, datasets=datasets
        )

    @contextmanager
    def run(self, precision: Precision, name: str = "", **options: Any) -> Generator[Built]:
        """Ready for its first step; the second run over the same scene finds its caches full.

        `name` is the run's, unlike any other's of the scene; by default that of its precision.
        """
        job = self.job(name or precision, **{"base_model_default_dtype": precision} | options)
        journal = job.open_journal()
        try:
            built = build_run(job, Reporter(journal, job.artifacts), RequestReader(job))
            try:
                yield built
            finally:
                built.close()
        finally:
            journal.close()

    def _resolve(self, options: dict[str, Any]) -> Resolution:
        layer = layer_from_mapping(OPTIONS | options, name="bench", known=option_fields())
        return resolve([layer], Directories(self.root, self.root), for_start=True)


def draw_pictures(folder: Path, count: int) -> None:
    """Soft colours with some detail, 96 pixels wide, the same at every call."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    for number in range(count):
        coarse = Image.frombytes("RGB", (6, 6), chance.randbytes(108))
        coarse.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"{number:05}.png")
