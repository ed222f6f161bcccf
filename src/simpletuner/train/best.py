"""The checkpoint with the lowest held-out loss, and when to give up looking for a better one. training.md §7.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.checkpoints import BEST
from simpletuner.train.report import Reporter


@dataclass(slots=True)
class Best:
    """Part of what a checkpoint holds. With several eval datasets the mean of their losses decides."""

    loss: float | None = None
    """The lowest that was measured."""
    stale: int = 0
    """Evaluations since."""
    kept_loss: float | None = None
    """Of `checkpoint-best`."""

    def see(self, loss: float) -> None:
        if self.loss is None or loss < self.loss:
            self.loss, self.stale = loss, 0
        else:
            self.stale += 1

    def is_to_keep(self, loss: float) -> bool:
        return self.kept_loss is None or loss < self.kept_loss

    def as_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "stale": self.stale, "kept_loss": self.kept_loss}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Best:
        return cls(row.get("loss"), row.get("stale", 0), row.get("kept_loss"))


def link_best(checkpoint: Path, loss: float, reporter: Reporter) -> None:
    """Point `checkpoint-best` at a checkpoint whose loss is the lowest of all that were saved."""
    beside = checkpoint.parent / f".{BEST}-tmp"
    beside.unlink(missing_ok=True)
    beside.symlink_to(checkpoint.name)
    beside.replace(checkpoint.parent / BEST)
    message = f"{checkpoint.name} has the lowest held-out loss so far: {loss:.6g}."
    reporter.notify("best_checkpoint", message, path=str(checkpoint), loss=loss)
