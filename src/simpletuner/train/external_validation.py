"""Validation by a program of the user's: nothing is drawn here, the events are those of any other pass. §7.3."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from simpletuner.config.validation_options import ValidationOptions
from simpletuner.events import HookData, ValidationData
from simpletuner.train.hooks import VALIDATION, Hooks
from simpletuner.train.report import Reporter


class ExternalValidation:
    def __init__(self, options: ValidationOptions, hooks: Hooks, reporter: Reporter) -> None:
        self.is_used = options.validation_method == "external-script" and not options.validation_disable
        self._in_background = options.validation_external_background
        self._hooks = hooks
        self._reporter = reporter

    def run(self, step: int, cause: str, checkpoint: Path | None, request_ids: tuple[str, ...] = ()) -> None:
        """Start the program on this run's newest checkpoint, and wait for it unless it is to run beside training."""
        say = partial(self._say, request_ids, step=step, cause=cause)
        if checkpoint is None and self._hooks.needs_checkpoint(VALIDATION):
            reason = "There is no checkpoint yet that --validation_external_script could be given."
            self._reporter.warn("no_checkpoint_yet", reason, hint="Lower --checkpoint_step_interval.")
            say(status="skipped", reason=reason)
            return
        say(status="started")
        future = self._hooks.start(VALIDATION, step, checkpoint, then=partial(_end, say))
        if future is not None and not self._in_background:
            with self._reporter.stage("validation", "Validating elsewhere"):
                self._hooks.wait_for(future)

    def _say(self, request_ids: tuple[str, ...], **facts: Any) -> None:
        for request_id in request_ids or (None,):
            self._reporter.validation(ValidationData(**facts), request_id)


def _end(say: Any, data: HookData) -> None:
    if data.status == "completed":
        say(status="completed", seconds=data.seconds)
    else:
        how = "timed out" if data.status == "timed_out" else data.status
        code = "" if data.exit_code is None else f" with exit code {data.exit_code}"
        say(status="failed", seconds=data.seconds, reason=f"The external validation {how}{code}.")
