"""`python -m simpletuner.train JOB_DIR`: the trainer process, and the edge where its errors become events."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.errors import ExitCode, UserError
from simpletuner.events import TrainingStatusData
from simpletuner.job import JobDir, RankError
from simpletuner.process import die_with_parent, nothing_is_garbage, return_freed_memory
from simpletuner.train.report import Reporter
from simpletuner.train.requests import Ended, RequestReader, rank_lost
from simpletuner.train.unused import leave_out

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
    is_alone = job.read_spec().num_processes == 1
    rank = 0 if is_alone else int(os.environ["RANK"])
    if not is_alone:
        die_with_parent(os.getppid())
    reporter = Reporter(job.open_journal() if rank == 0 else None, job.artifacts)
    requests = RequestReader(job, is_alone=is_alone)
    requests.listen_to_signals()
    return_freed_memory()
    code = _run(job, rank, reporter, requests, prepare)
    # torchrun takes any other end of a rank for a failure; how the run was asked to end, the journal tells.
    return code if is_alone or code is not ExitCode.STOPPED else ExitCode.DONE


def _run(
    job: JobDir, rank: int, reporter: Reporter, requests: RequestReader, prepare: Callable[[Run], None] | None
) -> ExitCode:
    fail = partial(_fail, job, rank, reporter)
    try:
        with nothing_is_garbage():
            import diffusers
            import transformers

            from simpletuner.train.half_on_cpu import fast_half_products
            from simpletuner.train.run import execute

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        with fast_half_products():
            return execute(job, reporter, requests, prepare)
    except Ended as ended:
        _abort(reporter)
        status = "cancelled" if ended.mode == "cancel" else "stopped"
        reason = f"Asked to {ended.mode} before the first step."
        code = int(ExitCode.STOPPED)
        reporter.status(
            TrainingStatusData(status=status, global_step=0, total_num_steps=0, reason=reason, exit_code=code)
        )
        return ExitCode.STOPPED
    except UserError as error:
        return fail(error)
    except MemoryError as error:
        return fail(_out_of_memory(reporter, error))
    except Exception as error:  # noqa: BLE001 - the edge: a bug becomes an event, with its traceback
        if type(error).__name__ == "OutOfMemoryError":
            return fail(_out_of_memory(reporter, error))
        if _is_disk_full(error):
            return fail(_disk_full(error))
        if _is_connection_lost(error):
            return fail(rank_lost("it no longer answers"))
        return fail(_bug(error), traceback="".join(traceback.format_exception(error)))


def _fail(job: JobDir, rank: int, reporter: Reporter, error: UserError, **data: str) -> ExitCode:
    print(data.get("traceback") or f"{error.code}: {error.message}\n{error.hint}", file=sys.stderr, flush=True)
    if error.code == "rank_lost":
        error = _told_by_another(job) or error
    elif rank:
        told = RankError(
            rank=rank, code=error.code, message=error.message, hint=error.hint, exit_code=int(error.exit_code)
        )
        job.write_rank_error(told)
    _end(reporter, error, **data)
    return error.exit_code


def _told_by_another(job: JobDir) -> UserError | None:
    """What a rank that is gone had to say."""
    told = job.read_rank_error()
    if told is None:
        return None
    message = f"Rank {told.rank}: {told.message}"
    return UserError(told.code, message, hint=told.hint, exit_code=ExitCode(told.exit_code))


def _bug(error: BaseException) -> UserError:
    message = f"{type(error).__name__}: {error}"
    return UserError("bug", message, hint="Please report it with its traceback.", exit_code=ExitCode.BUG)


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


def _is_connection_lost(error: BaseException) -> bool:
    """Between ranks, in the middle of a pass: weights that are spread are fetched there."""
    return type(error).__name__ == "DistBackendError" or "gloo/transport" in str(error)


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
    leave_out(JobDir(Path(sys.argv[1])).read_config()["config"])
    sys.exit(main(sys.argv[1]))
