"""`python -m simpletuner.train.cut JOB_DIR N kill|cancel`: a trainer that is ended just before its N-th micro-step.

`verify-resume` and `replay` start it: their ends have to come where a number says, not where a clock does. Of the run
itself nothing is changed: who ends it stands where the loop fetches its next batch.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.job import Command, CommandName, JobDir
from simpletuner.train.__main__ import main

if TYPE_CHECKING:
    from simpletuner.data.loader import Batch
    from simpletuner.train.loop import Run


def cut(job: JobDir, number: int, how: str) -> Callable[[Run], None]:
    """`kill`: by SIGKILL, as if the power went. `cancel`: by a request, which is read after the step."""

    def end() -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        job.send(Command(command=CommandName.CANCEL))

    def prepare(run: Run) -> None:
        run.batches = _before(run.batches, number, end)

    return prepare


def _before(batches: Iterator[Batch], number: int, act: Callable[[], None]) -> Iterator[Batch]:
    for count, batch in enumerate(batches, 1):
        if count == number:
            act()
        yield batch


if __name__ == "__main__":
    folder, number, how = sys.argv[1:]
    sys.exit(main(folder, cut(JobDir(Path(folder)), int(number), how)))
