"""The programs of the user's that a run starts: after a checkpoint, after an upload, in place of validation. §7.3."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from simpletuner.config.script import LOCAL_CHECKPOINT, SCRIPTS, find_placeholders, fixed_values, split_template
from simpletuner.config.train_config import TrainConfig
from simpletuner.events import HookData
from simpletuner.train.program import STOP_GRACE_S, Program, Programs
from simpletuner.train.report import Reporter
from simpletuner.train.requests import EndMode

VALIDATION = "validation_external_script"
AFTER_CHECKPOINT = "post_checkpoint_script"
AFTER_UPLOAD = "post_upload_script"
DISK_LOW = "disk_low_script"
_AT_ONCE = 2
_LIMIT_S = 3600.0


class Hooks:
    """Starts the commands of a run's options, at most two at once; their ends are events, and never end the run."""

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        asked_to_end: Callable[[], EndMode | None],
        *,
        limit_s: float = _LIMIT_S,
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        flat = config.to_flat()
        self._templates = {name: split_template(flat[name]) for name in SCRIPTS if flat[name] is not None}
        self._values = fixed_values(config)
        self._reporter = reporter
        self._limit_s = limit_s
        self._programs = Programs("hook", _AT_ONCE, asked_to_end, stop_grace_s)

    def needs_checkpoint(self, script: str) -> bool:
        return LOCAL_CHECKPOINT in find_placeholders(self._templates[script])

    def start(
        self,
        script: str,
        step: int,
        checkpoint: Path | None,
        *,
        remote: str = "",
        then: Callable[[HookData], None] = lambda data: None,
    ) -> Future[HookData] | None:
        """Queue the command of an option; None where there is none. `then` is called beside training, at its end."""
        if script not in self._templates:
            return None
        moment = {LOCAL_CHECKPOINT: str(checkpoint or ""), "remote_checkpoint_path": remote, "global_step": str(step)}
        program = Program(script, self._templates[script], self._values | moment, self._limit_s)
        return self._programs.start(program, lambda data: self._tell(data, then))

    def wait_for(self, future: Future[HookData]) -> HookData:
        """Its end. A cancel ends it at once, a stop after a moment."""
        self._programs.wait_for({future})
        return future.result()

    def finish(self) -> None:
        """Wait for all of them, as long as nobody asks the run to end; afterwards none is left."""
        self._programs.wait_for_all()
        self._programs.close()

    def close(self) -> None:
        """End whatever runs or waits."""
        self._programs.close()

    def checkpoints_in_use(self) -> frozenset[str]:
        return self._programs.checkpoints_in_use()

    def _tell(self, data: HookData, then: Callable[[HookData], None]) -> None:
        self._reporter.hook(data)
        then(data)
