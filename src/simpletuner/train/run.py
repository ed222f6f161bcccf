"""Sees a run through to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from simpletuner.errors import ExitCode
from simpletuner.events import Event, EventType, Severity, SummaryData, TrainingStatusData
from simpletuner.job import JobDir
from simpletuner.train.build import Built, build_run
from simpletuner.train.checkpoint import (
    load_checkpoint,
    read_point,
)
from simpletuner.train.lock import complete_lock
from simpletuner.train.loop import Outcome, Run, train
from simpletuner.train.metrics import peak_memory_bytes
from simpletuner.train.report import Reporter
from simpletuner.train.requests import RequestReader
from simpletuner.train.sentinel import RollBack
from simpletuner.train.sheet import publish_sheet


def execute(
    job: JobDir, reporter: Reporter, requests: RequestReader, prepare: Callable[[Run], None] | None = None
) -> ExitCode:
    """The whole of a run. Raises UserError and Ended; what it returns is the exit code of a run that ended well.

    `prepare` changes the run before its first step.
    """
    built = build_run(job, reporter, requests)
    if prepare is not None:
        prepare(built.run)
    try:
        outcome = _loop(built, reporter)
        complete_lock(Path(job.read_spec().output_dir))
        if outcome == "completed":
            _finish(built, reporter, job)
        elif outcome != "cancel":
            publish_sheet(Path(job.read_spec().output_dir), job.artifacts, reporter)
        built.inspection.finish()
    finally:
        built.close()
    _say_end(built, reporter, outcome)
    return ExitCode.DONE if outcome == "completed" else ExitCode.STOPPED


def _loop(built: Built, reporter: Reporter) -> Outcome:
    state = built.run.state
    status = "resumed" if built.resumed_from else "running"
    reporter.status(_status(built, status))
    if built.inspection.due.end(state):
        return "completed"
    if state.step == 0:
        built.inspection.measure(state)
    if built.inspection.due.on_startup:
        built.inspection.on_startup(state.step)
    built.metrics.start()
    while True:
        try:
            outcome = train(built.run)
            built.metrics.drain()
            return outcome
        except RollBack:
            _roll_back(built, reporter)


def _roll_back(built: Built, reporter: Reporter) -> None:
    """Go on from the last checkpoint; where there is none from here, the update having been left out."""
    run, inspection = built.run, built.inspection
    if inspection.saver.latest is None:
        reporter.warn("rollback_impossible", "There is no checkpoint to go back to yet: that update was left out.")
        return
    point = read_point(inspection.saver.latest)
    load_checkpoint(point, inspection.trained, run.update, inspection.device)
    run.state.go_back_to(point.state)
    built.metrics.rewind(run.state.step)
    inspection.forget_losses()
    built.loader.close()
    built.loader = run.batches = built.make_loader()
    reporter.notify("rolled_back", f"The run goes on from {point.folder.name}.", step=run.state.step)


def _finish(built: Built, reporter: Reporter, job: JobDir) -> None:
    state, inspection, output_dir = built.run.state, built.inspection, Path(job.read_spec().output_dir)
    inspection.final_checkpoint(state)
    pipeline = inspection.export()
    inspection.measure(state)
    inspection.final_validation(state.step, pipeline)
    publish_sheet(output_dir, job.artifacts, reporter)
    inspection.publisher.publish(state.step, pipeline)
    inspection.finish()
    with reporter.stage("training_complete", "Done"):
        pass
    summary = SummaryData(
        steps=state.step,
        samples=state.samples,
        seconds=round(time.monotonic() - built.started_at, 3),
        memory_peak_bytes=peak_memory_bytes(),
        memory_predicted_bytes=built.memory.predicted_bytes(),
        files=[str(pipeline), str(output_dir / "training_metrics.jsonl")],
    )
    reporter.emit(Event(type=EventType.TRAINING_SUMMARY, title="Summary", message=str(pipeline), data=summary))


def _say_end(built: Built, reporter: Reporter, outcome: Outcome) -> None:
    names = {"completed": "completed", "stop": "stopped", "yield": "stopped", "cancel": "cancelled"}
    severity = Severity.SUCCESS if outcome == "completed" else Severity.INFO
    if outcome != "completed":
        with reporter.stage("training_abort", "Ending early"):
            pass
    reporter.status(_status(built, names[outcome]), severity=severity)


def _status(built: Built, status: str) -> TrainingStatusData:
    state = built.run.state
    return TrainingStatusData(
        status=status,  # pyright: ignore[reportArgumentType]
        global_step=state.step,
        total_num_steps=built.inspection.due.total_steps,
        epoch=state.position.epoch,
        final_epoch=built.final_epoch,
        resumed_from=built.resumed_from,
    )
