"""Sees a run through to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from simpletuner.errors import ExitCode
from simpletuner.events import Event, EventType, Severity, SummaryData, TrainingStatusData
from simpletuner.job import JobDir
from simpletuner.train.build import Built, build_rank
from simpletuner.train.lock import complete_lock
from simpletuner.train.loop import Outcome, Run, train
from simpletuner.train.metrics import peak_memory_bytes
from simpletuner.train.ranks import join_ranks
from simpletuner.train.replica import follow
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
    ranks = join_ranks(job.read_spec().num_processes)
    built = build_rank(job, reporter, requests, ranks)
    replica = built if isinstance(built, Built) else built[0]
    if prepare is not None:
        prepare(replica.run)
    if isinstance(built, Built):
        return _see_through(built, reporter, job)
    follow(*built)
    replica.close()
    return ExitCode.DONE


def _see_through(built: Built, reporter: Reporter, job: JobDir) -> ExitCode:
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
    built.inspection.release()
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
    latest = built.run.ranks.share(built.inspection.saver.latest)
    if latest is None:
        reporter.warn("rollback_impossible", "There is no checkpoint to go back to yet: that update was left out.")
        return
    built.go_back(latest)
    step = built.run.state.step
    built.metrics.rewind(step)
    built.inspection.forget_losses()
    reporter.notify("rolled_back", f"The run goes on from {latest.name}.", step=step)


def _finish(built: Built, reporter: Reporter, job: JobDir) -> None:
    state, inspection, output_dir = built.run.state, built.inspection, Path(job.read_spec().output_dir)
    inspection.final_checkpoint(state)
    pipeline = inspection.export()
    inspection.measure(state)
    inspection.final_validation(state.step, pipeline)
    inspection.release()
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
        memory_choice=built.memory.choice,
        files=[str(pipeline), str(output_dir / "training_metrics.jsonl")],
    )
    reporter.emit(Event(type=EventType.TRAINING_SUMMARY, title="Summary", message=str(pipeline), data=summary))


def _say_end(built: Built, reporter: Reporter, outcome: Outcome) -> None:
    names = {"completed": "completed", "stop": "stopped", "yield": "stopped", "cancel": "cancelled"}
    severity = Severity.SUCCESS if outcome == "completed" else Severity.INFO
    if outcome != "completed":
        with reporter.stage("training_abort", "Ending early"):
            pass
    code = ExitCode.DONE if outcome == "completed" else ExitCode.STOPPED
    status = _status(built, names[outcome]).model_copy(update={"exit_code": int(code)})
    reporter.status(status, severity=severity)


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
