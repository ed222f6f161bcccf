"""`python -m simpletuner.train JOB_DIR`: the trainer process, and the edge where its errors become events."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.errors import ExitCode, UserError
from simpletuner.events import TrainingStatusData
from simpletuner.job import JobDir
from simpletuner.process import return_freed_memory
from simpletuner.train.report import Reporter
from simpletuner.train.requests import Ended, RequestReader

if TYPE_CHECKING:
    from simpletuner.train.loop import Run


def main(folder: str, prepare: Callable[[Run], None] | None = None) -> ExitCode:
    """`prepare` changes the run before its first step."""
    try:
        return _main(folder, prepare)
    except OSError as error:
        if not _is_disk_full(error):
            raise
        # Of the journal: nothing can be told there, so the exit code and the log have to do; the runner knows.
        print(f"disk_full: {_disk_full(error)}", file=sys.stderr, flush=True)
        return ExitCode.STORAGE


def _main(folder: str, prepare: Callable[[Run], None] | None) -> ExitCode:
    job = JobDir(Path(folder))
    journal = job.open_journal()
    reporter = Reporter(journal, job.artifacts)
    requests = RequestReader(job)
    requests.listen_to_signals()
    return_freed_memory()
    try:
        import diffusers
        import transformers

        from simpletuner.train.run import execute

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        return execute(job, reporter, requests, prepare)
    except Ended as ended:
        _abort(reporter)
        status = "cancelled" if ended.mode == "cancel" else "stopped"
        reason = f"Asked to {ended.mode} before the first step."
        reporter.status(TrainingStatusData(status=status, global_step=0, total_num_steps=0, reason=reason))
        return ExitCode.STOPPED
    except UserError as error:
        return _fail(reporter, error)
    except MemoryError as error:
        return _fail(reporter, _out_of_memory(reporter, error))
    except Exception as error:  # noqa: BLE001 - the edge: a bug becomes an event, with its traceback
        if type(error).__name__ == "OutOfMemoryError":
            return _fail(reporter, _out_of_memory(reporter, error))
        if _is_disk_full(error):
            return _fail(reporter, _disk_full(error))
        return _bug(reporter, error)


def _fail(reporter: Reporter, error: UserError) -> ExitCode:
    print(f"{error.code}: {error.message}\n{error.hint}", file=sys.stderr, flush=True)
    _end(reporter, error)
    return error.exit_code


def _bug(reporter: Reporter, error: BaseException) -> ExitCode:
    traceback.print_exception(error)
    told = UserError(
        "bug", f"{type(error).__name__}: {error}", hint="Please report it with its traceback.", exit_code=ExitCode.BUG
    )
    _end(reporter, told, traceback="".join(traceback.format_exception(error)))
    return ExitCode.BUG


def _end(reporter: Reporter, error: UserError, **data: str) -> None:
    """Stage, abort, status, and last of all the error itself."""
    stage, step, total = reporter.open_stage, reporter.step, reporter.total_steps
    _abort(reporter)
    code = int(error.exit_code)
    status = TrainingStatusData(
        status="failed", global_step=step, total_num_steps=total, reason=error.message, exit_code=code
    )
    reporter.status(status)
    problems = [problem.as_dict() for problem in error.problems]
    reporter.error(error, exit_code=code, problems=problems, stage=stage, step=step, **data)


def _abort(reporter: Reporter) -> None:
    reporter.fail_stages()
    with reporter.stage("training_abort", "Ending early"):
        pass


def _is_disk_full(error: BaseException) -> bool:
    """safetensors tells the number of the system's error in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if type(error).__name__ == "SafetensorError":
        return any(f"(os error {number})" in str(error) for number in full)
    return isinstance(error, OSError) and error.errno in full


def _disk_full(error: BaseException) -> UserError:
    return UserError(
        "disk_full",
        f"The disk is full: {error}",
        hint="Make room; complete checkpoints are whole.",
        exit_code=ExitCode.STORAGE,
    )


def _out_of_memory(reporter: Reporter, error: BaseException) -> UserError:
    where = f"in the stage {reporter.open_stage!r}" if reporter.open_stage else f"after step {reporter.step}"
    peak = f"{_peak_bytes() / 1e9:.2f} GB were in use"
    predicted = reporter.predicted_bytes
    told = f"{peak}, {predicted / 1e9:.2f} GB predicted" if predicted is not None else peak
    return UserError(
        "out_of_memory",
        f"Memory ran out {where}; {told}: {error}",
        hint="Try --gradient_checkpointing true, a smaller --train_batch_size with more "
        "--gradient_accumulation_steps, or a smaller --resolution.",
        exit_code=ExitCode.OUT_OF_MEMORY,
    )


def _peak_bytes() -> int:
    # Not at the top: whoever ran out of memory has torch already, and a wrong option must be told without it.
    from simpletuner.train.metrics import peak_memory_bytes

    return peak_memory_bytes()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
