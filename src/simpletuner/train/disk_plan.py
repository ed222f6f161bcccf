"""What a run will leave on disk, from shapes, against what is free. training.md §9."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from simpletuner.config.train_config import TrainConfig
from simpletuner.data.manifest import Manifest
from simpletuner.data.prepare import MASK
from simpletuner.errors import Level, Problem
from simpletuner.train.memory import gigabytes
from simpletuner.train.rehearsal import Rehearsal, Training


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes. Pictures of previews and validations are too small to count."""

    checkpoint_bytes: int
    num_checkpoints: int
    """Those that are kept, and the one that is written before the oldest goes."""
    latents_bytes: int
    captions_bytes: int
    """At most: as if every caption were as long as can be."""
    free_bytes: int
    """On the disk of `output_dir`."""

    @classmethod
    def of(cls, config: TrainConfig, manifests: Sequence[Manifest], rehearsal: Rehearsal, training: Training) -> Self:
        parts = [part for manifest in manifests for part in (manifest, *manifest.mates) if part.kind != MASK]
        captions = {caption for manifest in manifests for caption in manifest.effective_captions()}
        return cls(
            checkpoint_bytes=training.checkpoint_bytes,
            num_checkpoints=_num_checkpoints(config),
            latents_bytes=sum(_latents_bytes(part, rehearsal) for part in parts),
            captions_bytes=len(captions) * training.caption_bytes,
            free_bytes=shutil.disk_usage(_nearest_folder(Path(config.model.output_dir))).free,
        )

    @property
    def predicted_bytes(self) -> int:
        return self.checkpoint_bytes * self.num_checkpoints + self.latents_bytes + self.captions_bytes

    def check(self) -> list[Problem]:
        """A warning where the checkpoints alone have no room: caches may be elsewhere, or here already."""
        needed = self.checkpoint_bytes * self.num_checkpoints
        if needed <= self.free_bytes:
            return []
        return [
            Problem(
                code="disk_too_small",
                level=Level.WARNING,
                pointer="/--checkpoints_total_limit",
                message=f"{self.num_checkpoints} checkpoints of {gigabytes(self.checkpoint_bytes)} need "
                f"{gigabytes(needed)}; the disk of --output_dir has {gigabytes(self.free_bytes)} free.",
                hint="Lower --checkpoints_total_limit, or choose another --output_dir.",
            )
        ]

    def as_facts(self) -> dict[str, Any]:
        return {**asdict(self), "predicted_bytes": self.predicted_bytes, "message": str(self)}

    def __str__(self) -> str:
        return (
            f"Predicted on disk: {self.num_checkpoints} checkpoints of {gigabytes(self.checkpoint_bytes)}, latents "
            f"{gigabytes(self.latents_bytes)}, captions at most {gigabytes(self.captions_bytes)}; "
            f"{gigabytes(self.free_bytes)} are free."
        )


def _num_checkpoints(config: TrainConfig) -> int:
    """Of a run of known length; one that counts epochs is taken to reach its limit."""
    limit, every = config.checkpoint.checkpoints_total_limit, config.checkpoint.checkpoint_step_interval
    steps = config.run.max_train_steps
    made = -(-steps // every) if steps and every else limit + 1
    return min(limit + 1, made) if limit else made


def _latents_bytes(manifest: Manifest, rehearsal: Rehearsal) -> int:
    """Pictures of equal bytes and plan share an entry."""
    rows = manifest.kept.tolist()
    distinct = {(manifest.content(row), manifest.plan(row).transform): manifest.plan(row).target for row in rows}
    return sum(map(rehearsal.latent_bytes, distinct.values()))


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())
