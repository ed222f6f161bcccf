"""Several trainers for one run, forked from the test: what torchrun does, without starting Python anew for each."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable

from tiny_world import Hook, Ran, TinyWorld, at_each_backward

from simpletuner.errors import ExitCode
from simpletuner.job import JobDir
from simpletuner.train.__main__ import main

WITHIN_S = 60


def run_ranks(world: TinyWorld, job: JobDir, hook: Callable[[int, int], Hook] | None = None) -> tuple[Ran, list[int]]:
    """What the run told, and the exit code of each rank. `hook` is made for a rank and its process number there."""
    count = job.read_spec().num_processes
    variables = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
    # A process that was forked from one which has used torch's threads must not use torch in threads of its own.
    variables["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    forking = multiprocessing.get_context("fork")

    def run(rank: int) -> None:
        os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
        with at_each_backward(hook(rank, os.getpid()) if hook else lambda _, loss: loss):
            os._exit(main(str(job.root)))

    ranks = [forking.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(WITHIN_S)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert None not in codes, f"a rank hangs: {codes}"
    return world.ran(job, ExitCode.DONE), [code for code in codes if code is not None]


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("localhost", 0))
        return asked.getsockname()[1]
