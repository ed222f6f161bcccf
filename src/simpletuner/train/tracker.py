"""Trackers: a run's numbers and images, sent to wandb or tensorboard. One that fails is named once and left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from simpletuner.config.publishing_options import PublishingOptions, tracker_names
from simpletuner.events import ValidationImageData
from simpletuner.train.report import Reporter


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None: ...

    def close(self) -> None: ...


class Wandb:
    def __init__(self, options: PublishingOptions, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        self._image: Any = wandb.Image
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

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._run.log({name: self._image(image, caption=caption)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Tensorboard:
    def __init__(self, options: PublishingOptions, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / options.tracker_run_name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image, caption: str) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

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
        reporter.followers.append(self)
        for name in tracker_names(options.report_to):
            self._guard(name, lambda name=name: self._open.update({name: TRACKERS[name](options, folder, config)}))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """`values` that are None are left out."""
        numbers = {name: value for name, value in values.items() if value is not None}
        for name, tracker in list(self._open.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(step, numbers))

    def metric(self, step: int, name: str, value: float) -> None:
        self.log(step, {name: value})

    def image(self, data: ValidationImageData, name: str, content: bytes) -> None:
        """Of a sampler's passing images nothing is sent."""
        if data.validation_type == "intermediary" or not self._open:
            return
        place = "benchmark" if data.validation_type == "benchmark" else "validation"
        width, height = data.resolution
        title, step = f"{place}/{data.shortname}_{data.index}_{width}x{height}", data.global_step
        image = Image.open(BytesIO(content))
        for key, tracker in list(self._open.items()):
            self._guard(key, lambda tracker=tracker: tracker.image(step, title, image, data.prompt))

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
