"""Trackers: the numbers of a run, sent to wandb or tensorboard. One that fails is named once and left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from simpletuner.config.publishing_options import PublishingOptions, tracker_names
from simpletuner.train.report import Reporter


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    def __init__(self, options: PublishingOptions, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        settings = wandb.Settings(init_timeout=30, silent=True, console="off")
        self._run = wandb.init(
            project=options.tracker_project_name,
            name=options.tracker_run_name,
            dir=str(folder),
            config=dict(config),
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Tensorboard:
    def __init__(self, options: PublishingOptions, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / options.tracker_run_name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


TRACKERS: Mapping[str, Callable[[PublishingOptions, Path, Mapping[str, Any]], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": Tensorboard,
}


class Trackers:
    """All trackers that work. Whatever a tracker raises is a warning: the run does not depend on it."""

    def __init__(self, options: PublishingOptions, folder: Path, config: Mapping[str, Any], reporter: Reporter) -> None:
        self._reporter = reporter
        self._open: dict[str, Tracker] = {}
        for name in tracker_names(options.report_to):
            self._guard(name, lambda name=name: self._open.update({name: TRACKERS[name](options, folder, config)}))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """`values` that are None are left out."""
        numbers = {name: value for name, value in values.items() if value is not None}
        for name, tracker in list(self._open.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(step, numbers))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._guard(name, tracker.close)

    def _guard(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - foreign code behind a network: the edge where it ends
            self._open.pop(name, None)
            hint = f"pip install {name}" if isinstance(error, ImportError) else "The run goes on without it."
            self._reporter.warn("tracker_failed", f"The tracker {name} cannot be used: {error}", hint=hint)
