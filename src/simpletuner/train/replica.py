"""What every rank has of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simpletuner.data.loader import Loader
from simpletuner.train.checkpoint import ResumePoint, read_point
from simpletuner.train.lead import Follower
from simpletuner.train.loop import Outcome, Run, train
from simpletuner.train.sentinel import RollBack
from simpletuner.train.trained import Trained


@dataclass(slots=True)
class Replica:
    """A run that is ready to step."""

    run: Run
    trained: Trained
    loader: Loader
    make_loader: Callable[[], Loader]
    """A new one, from the state's position on."""
    resume: Callable[[ResumePoint], None]
    """Put everything but the place back to what a checkpoint holds."""

    def go_back(self, latest: Path) -> None:
        """To a checkpoint of this run."""
        point = read_point(latest)
        self.resume(point)
        self.run.state.go_back_to(point.state)
        self.loader.close()
        self.loader = self.run.batches = self.make_loader()

    def close(self) -> None:
        self.loader.close()


def follow(replica: Replica, follower: Follower) -> None:
    """The part in a run of every rank but the first."""
    outcome: Outcome | None = None
    follower.begin()
    while outcome is None:
        try:
            outcome = train(replica.run)
        except RollBack:
            latest = replica.run.ranks.share(None)
            if latest is not None:
                replica.go_back(latest)
    if outcome == "completed":
        follower.finish()
