"""A trainer at the protocol: writes the journal, obeys commands.

The job's `config`, or the JSON of the variable FAKE_TRAINER, says how it behaves:
steps (0: for ever; else `max_train_steps`), step_s, ignores (commands and SIGTERM), exit_code,
error, chatter (lines a step), start_s.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from simpletuner.errors import ExitCode
from simpletuner.events import (
    Event,
    EventType,
    Journal,
    NoticeData,
    Progress,
    Severity,
    TrainingStatusData,
    ValidationData,
)
from simpletuner.job import CommandName, CommandReader, JobDir


def status(journal: Journal, name: Any, step: int, steps: int, **more: Any) -> None:
    data = TrainingStatusData(status=name, global_step=step, total_num_steps=steps, **more)
    journal.append(Event(type=EventType.TRAINING_STATUS, data=data))


def progress(journal: Journal, step: int, steps: int) -> None:
    part = Progress(label="Steps", current=step, total=steps, percent=100 * step / max(1, steps), metrics={"loss": 0.5})
    journal.append(Event(type=EventType.TRAINING_PROGRESS, title="Training", message=f"Step {step}", progress=part))


def obey(journal: Journal, commands: CommandReader, step: int, steps: int) -> int | None:
    for command in commands.read():
        if command.command is CommandName.VALIDATE:
            data = ValidationData(status="completed", step=step, cause="request")
            journal.append(Event(type=EventType.TRAINING_VALIDATION, request_id=command.request_id, data=data))
        elif command.command in {CommandName.STOP, CommandName.CANCEL, CommandName.YIELD}:
            status(journal, "stopped", step, steps, exit_code=ExitCode.STOPPED)
            return ExitCode.STOPPED
    return None


def main() -> int:
    job = JobDir(Path(sys.argv[1]))
    config = job.read_config()["config"] | json.loads(os.environ.get("FAKE_TRAINER", "{}"))
    journal = job.open_journal()
    commands = CommandReader(job)
    if config.get("ignores"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    steps = config.get("steps", config.get("max_train_steps", 0))
    time.sleep(config.get("start_s", 0))
    print("trainer says hello", flush=True)
    if "error" in config:
        data = NoticeData(code=config["error"], hint="Mend it.")
        journal.append(Event(type=EventType.ERROR, severity=Severity.ERROR, message="It broke.", data=data))
        return config["exit_code"]
    status(journal, "running", 0, steps)
    step = 0
    while not steps or step < steps:
        if not config.get("ignores") and (code := obey(journal, commands, step, steps)) is not None:
            return code
        step += 1
        for line in range(config.get("chatter", 0)):
            print(f"step {step} line {line}", file=sys.stderr)
        progress(journal, step, steps)
        time.sleep(config.get("step_s", 0.01))
    status(journal, "completed", step, steps, exit_code=0)
    return config.get("exit_code", 0)


if __name__ == "__main__":
    raise SystemExit(main())
