"""Programs that a run starts beside training: each in a process group that no process of it outlives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

from simpletuner.config.script import LOCAL_CHECKPOINT, fill_words, find_placeholders
from simpletuner.events import HookData
from simpletuner.train.requests import EndMode

STOP_GRACE_S = 10.0
_TAIL = 4000
ProgramStatus = Literal["completed", "failed", "timed_out", "cancelled"]


class Program:
    """One start of a command, in a process group of its own."""

    def __init__(self, script: str, words: list[str], values: Mapping[str, str], limit_s: float) -> None:
        self.checkpoint = values[LOCAL_CHECKPOINT]
        self._script = script
        self._words = words
        self._values = values
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._group: int | None = None
        self._ended_as: ProgramStatus | None = None

    def run(self) -> HookData:
        """Returns when no process of the group is left."""
        started_at = time.monotonic()
        with tempfile.TemporaryFile() as output:
            code = self._run(output)
            tail = _read_tail(output)
        status = self._ended_as or ("completed" if code == 0 else "failed")
        return HookData(
            script=self._script,
            argv=fill_words(self._words, self._values),
            status=status,
            exit_code=code if self._ended_as is None else None,
            seconds=round(time.monotonic() - started_at, 3),
            output_tail=tail,
        )

    def end(self, status: ProgramStatus) -> None:
        """Kill the group, or keep it from starting."""
        with self._lock:
            self._ended_as = self._ended_as or status
            self._kill_group()

    def _run(self, output: IO[bytes]) -> int | None:
        """Exit code; None where it did not start, and `output` says why."""
        values = {**{f"env:{name}": value for name, value in os.environ.items()}, **self._values}
        if missing := sorted(find_placeholders(self._words) - values.keys()):
            output.write(f"Not set here: {', '.join(missing)}.".encode())
            return None
        life, inherited = os.pipe()
        with os.fdopen(life, "rb") as end:
            process = self._start(fill_words(self._words, values), output, inherited)
            if process is None:
                return None
            timer = threading.Timer(self._limit_s, self.end, ["timed_out"])
            timer.start()
            end.read()
            timer.cancel()
        # The leader is gone and not reaped yet: until then its number names this group and no other.
        with self._lock:
            self._kill_group()
            self._group = None
        return process.wait()

    def _kill_group(self) -> None:
        # Nobody may be left but the dead leader, or a program that became another user's.
        with suppress(ProcessLookupError, PermissionError):
            if self._group is not None:
                os.killpg(self._group, signal.SIGKILL)

    def _start(self, argv: list[str], output: IO[bytes], inherited: int) -> subprocess.Popen[bytes] | None:
        """`inherited`: the end of a pipe that only the group's leader holds."""
        # Without -P a module of the workspace could stand for one of Python's own.
        command = [sys.executable, "-P", "-m", "simpletuner.train.hook_group", str(os.getpid()), *argv]
        try:
            with self._lock:
                if self._ended_as is not None:
                    return None
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    pass_fds=(inherited,),
                )
                self._group = process.pid
                return process
        except (OSError, ValueError) as error:  # too long for the system, or with a NUL in it
            output.write(str(error).encode())
            return None
        finally:
            os.close(inherited)


class Programs:
    """A queue of programs, `at_once` of them running. A cancel ends them at once, a stop after a moment."""

    def __init__(
        self, name: str, at_once: int, asked_to_end: Callable[[], EndMode | None], stop_grace_s: float = STOP_GRACE_S
    ) -> None:
        self._asked_to_end = asked_to_end
        self._stop_grace_s = stop_grace_s
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix=name)
        self._started: dict[Future[HookData], Program] = {}

    def start(self, program: Program, then: Callable[[HookData], None]) -> Future[HookData]:
        """`then` is called beside training, at the program's end."""
        future = self._pool.submit(_run, program, then)
        self._started[future] = program
        return future

    def wait_for(self, futures: set[Future[HookData]], watch: Callable[[int], None] = lambda done: None) -> None:
        """`watch` is told again and again how many have ended."""
        deadline = float("inf")
        while (left := wait(futures, timeout=0.1)).not_done:
            watch(len(left.done))
            mode = self._asked_to_end()
            if mode is not None:
                deadline = min(deadline, time.monotonic() + (0 if mode == "cancel" else self._stop_grace_s))
            if time.monotonic() >= deadline:
                for program in self._running(futures):
                    program.end("cancelled")

    def wait_for_all(self, watch: Callable[[int], None] = lambda done: None) -> None:
        self.wait_for(set(self._started), watch)

    def close(self) -> None:
        """End whatever runs or waits."""
        for program in self._running(set(self._started)):
            program.end("cancelled")
        self._pool.shutdown()
        for future in self._started:
            future.result()

    def checkpoints_in_use(self) -> frozenset[str]:
        return frozenset(Path(program.checkpoint).name for program in self._running(set(self._started)))

    @property
    def count(self) -> int:
        """Of those that were ever started."""
        return len(self._started)

    def _running(self, futures: set[Future[HookData]]) -> list[Program]:
        # A copy: the end of one program may start another, from its thread.
        started = list(self._started.items())
        return [program for future, program in started if future in futures and not future.done()]


def _run(program: Program, then: Callable[[HookData], None]) -> HookData:
    data = program.run()
    then(data)
    return data


def _read_tail(output: IO[bytes]) -> str:
    """The last characters, however the program was encoded."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - 4 * _TAIL))
    return output.read().decode(errors="replace")[-_TAIL:]
