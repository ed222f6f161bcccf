"""The output folder's disk: whether it can be written, and what is done when little room is left. training.md §2.7."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from simpletuner.config.disk import parse_bytes
from simpletuner.config.training_options import CheckpointOptions
from simpletuner.errors import ExitCode, UserError
from simpletuner.train.hooks import DISK_LOW, Hooks
from simpletuner.train.report import Reporter
from simpletuner.train.requests import EndMode

_POLL_S = 30.0
_LISTEN_S = 0.5
"""Requests are seen this soon while the disk is waited for."""


class DiskWatch:
    """Looks before each save. `free_bytes` and `sleep` are the disk and the clock."""

    def __init__(
        self,
        options: CheckpointOptions,
        output_dir: Path,
        reporter: Reporter,
        asked_to_end: Callable[[], EndMode | None],
        hooks: Hooks,
        *,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._least = parse_bytes(options.disk_low_threshold or "0") or 0
        self._action = options.disk_low_action
        self._output_dir = output_dir
        self._reporter = reporter
        self._asked_to_end = asked_to_end
        self._hooks = hooks
        self._free_bytes = free_bytes
        self._sleep = sleep

    def find_room(self, step: int, latest: Path | None) -> bool:
        """Whether to save; not on the way to a cancel. `latest`: the newest checkpoint, for the script.

        Raises UserError `disk_low` (73) when there is no room to be had.
        """
        if not self._is_low():
            return True
        if self._action == "wait":
            return self._wait()
        if self._action == "script":
            program = self._hooks.start(DISK_LOW, step, latest)
            assert program is not None  # `config.disk` asks for one
            self._hooks.wait_for(program)
            if not self._is_low():
                return True
        raise UserError(
            "disk_low",
            f"{self._told()} The checkpoint of step {step} is not saved.",
            hint="Make room and start again, or lower --disk_low_threshold; earlier checkpoints are whole.",
            pointer="/--disk_low_threshold",
            exit_code=ExitCode.STORAGE,
        )

    def _wait(self) -> bool:
        """Until there is room, or until asked to end: a stop then tries its save with what there is."""
        self._reporter.warn("disk_low", f"{self._told()} Training waits.", hint="Make room, or stop the job.")
        began_at = time.monotonic()
        while self._is_low():
            for _ in range(int(_POLL_S / _LISTEN_S)):
                if mode := self._asked_to_end():
                    return mode != "cancel"
                self._sleep(_LISTEN_S)
        seconds = round(time.monotonic() - began_at, 1)
        self._reporter.notify("disk_has_room", f"There is room in {self._output_dir} again.", seconds=seconds)
        return True

    def _is_low(self) -> bool:
        return self._free_bytes(self._output_dir) < self._least

    def _told(self) -> str:
        free, least = (f"{size / (1 << 30):.2f} GiB" for size in (self._free_bytes(self._output_dir), self._least))
        return f"{free} are free in {self._output_dir}, less than --disk_low_threshold {least}."


def make_output_dir(folder: Path) -> None:
    """Raises UserError `output_dir_not_writable` (73)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            "output_dir_not_writable",
            f"The output folder {folder} cannot be written: {error.strerror}.",
            hint="Choose another --output_dir or change its rights.",
            pointer="/--output_dir",
            exit_code=ExitCode.STORAGE,
        ) from error
