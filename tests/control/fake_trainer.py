"""A trainer at the protocol: writes the journal, obeys commands.

The job's `config`, or the JSON of the variable FAKE_TRAINER, says how it behaves:
steps (0: for ever; else `max_train_steps`), step_s, ignores (commands and SIGTERM), exit_code,
error, chatter (lines a step), start_s, saves (a checkpoint each so many steps and at a stop, from the latest of which
it goes on; its "weights" are the number of every step, a line each), draws (a picture at the end).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from simpletuner.checkpoints import (
    complete_checkpoint,
    find_faults,
    list_checkpoints,
    prune_checkpoints,
    temporary_folder,
)
from simpletuner.errors import ExitCode
from simpletuner.events import (
    Checkpoint,
    Event,
    EventType,
    Journal,
    Media,
    NoticeData,
    Progress,
    Severity,
    TrainingStatusData,
    ValidationData,
    ValidationImageData,
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


def save(journal: Journal, output_dir: Path, step: int, weights: list[str]) -> None:
    folder = temporary_folder(output_dir, step)
    (folder / "weights.txt").write_text("\n".join(weights))
    place = complete_checkpoint(folder, output_dir, step)
    prune_checkpoints(output_dir, 2)
    part = Checkpoint(path=str(place.path), label=place.name, step=step, is_final=False, rolling=True, bytes=1)
    journal.append(Event(type=EventType.TRAINING_CHECKPOINT, message=place.name, checkpoint=part))


def restore(output_dir: Path) -> tuple[int, list[str]]:
    latest = next((folder for folder in list_checkpoints(output_dir) if not find_faults(folder.path)), None)
    return (latest.step, (latest.path / "weights.txt").read_text().splitlines()) if latest else (0, [])


def draw(journal: Journal, job: JobDir, step: int) -> None:
    (job.artifacts / "picture.png").write_bytes(b"not really a picture")
    data = ValidationImageData(
        step=1, timestep=1, resolution=(8, 8), validation_type="final", prompt="a", step_label="1/1", global_step=step,
        shortname="a",
    )  # fmt: skip
    media = Media(artifact_id="picture.png", mime_type="image/png", width=8, height=8)
    journal.append(Event(type=EventType.VALIDATION_IMAGE, data=data, images=[media]))


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
    output_dir, saves = Path(job.read_spec().output_dir), config.get("saves", 0)
    step, weights = restore(output_dir) if saves else (0, [])
    status(journal, "resumed" if step else "running", step, steps)
    while not steps or step < steps:
        if not config.get("ignores") and (code := obey(journal, commands, step, steps)) is not None:
            if saves:
                save(journal, output_dir, step, weights)
            return code
        step += 1
        weights.append(f"step {step}")
        if saves and step % saves == 0:
            save(journal, output_dir, step, weights)
        for line in range(config.get("chatter", 0)):
            print(f"step {step} line {line}", file=sys.stderr)
        progress(journal, step, steps)
        time.sleep(config.get("step_s", 0.01))
    if config.get("draws"):
        draw(journal, job, step)
    status(journal, "completed", step, steps, exit_code=0)
    return config.get("exit_code", 0)


if __name__ == "__main__":
    raise SystemExit(main())
