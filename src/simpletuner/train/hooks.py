"""Programs of the user's that a run starts: after a checkpoint, after an upload, in place of validation. §7.3."""

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

from simpletuner.config.script import (
    LOCAL_CHECKPOINT,
    SCRIPTS,
    fill_words,
    find_placeholders,
    fixed_values,
    split_template,
)
from simpletuner.config.train_config import TrainConfig
from simpletuner.events import HookData
from simpletuner.train.report import Reporter
from simpletuner.train.requests import EndMode

VALIDATION = "validation_external_script"
AFTER_CHECKPOINT = "post_checkpoint_script"
DISK_LOW = "disk_low_script"
_AT_ONCE = 2
_LIMIT_S = 3600.0
_STOP_GRACE_S = 10.0
_TAIL = 4000
HookStatus = Literal["completed", "failed", "timed_out", "cancelled"]


class Program:
    """One start of a command, in a process group of its own that no process of it outlives."""

    def __init__(self, script: str, words: list[str], values: Mapping[str, str], limit_s: float) -> None:
        self.checkpoint = values[LOCAL_CHECKPOINT]
        self._script = script
        self._words = words
        self._values = values
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._group: int | None = None
        self._ended_as: HookStatus | None = None

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

    def end(self, status: HookStatus) -> None:
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


class Hooks:
    """Starts the commands of a run's options, at most two at once; their ends are events, and never end the run."""

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        asked_to_end: Callable[[], EndMode | None],
        *,
        limit_s: float = _LIMIT_S,
        stop_grace_s: float = _STOP_GRACE_S,
    ) -> None:
        flat = config.to_flat()
        self._templates = {name: split_template(flat[name]) for name in SCRIPTS if flat[name] is not None}
        self._values = fixed_values(config)
        self._reporter = reporter
        self._asked_to_end = asked_to_end
        self._limit_s = limit_s
        self._stop_grace_s = stop_grace_s
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="hook")
        self._started: dict[Future[HookData], Program] = {}

    def needs_checkpoint(self, script: str) -> bool:
        return LOCAL_CHECKPOINT in find_placeholders(self._templates[script])

    def start(
        self,
        script: str,
        step: int,
        checkpoint: Path | None,
        *,
        remote: str = "",
        then: Callable[[HookData], None] = lambda data: None,
    ) -> Future[HookData] | None:
        """Queue the command of an option; None where there is none. `then` is called beside training, at its end."""
        if script not in self._templates:
            return None
        moment = {LOCAL_CHECKPOINT: str(checkpoint or ""), "remote_checkpoint_path": remote, "global_step": str(step)}
        program = Program(script, self._templates[script], self._values | moment, self._limit_s)
        future = self._pool.submit(self._run, program, then)
        self._started[future] = program
        return future

    def wait_for(self, future: Future[HookData]) -> HookData:
        """Its end. A cancel ends it at once, a stop after a moment."""
        self._wait({future})
        return future.result()

    def finish(self) -> None:
        """Wait for all of them, as long as nobody asks the run to end; afterwards none is left."""
        self._wait(set(self._started))
        self.close()

    def close(self) -> None:
        """End whatever runs or waits."""
        for program in self._running(set(self._started)):
            program.end("cancelled")
        self._pool.shutdown()
        for future in self._started:
            future.result()

    def checkpoints_in_use(self) -> frozenset[str]:
        return frozenset(Path(program.checkpoint).name for program in self._running(set(self._started)))

    def _wait(self, futures: set[Future[HookData]]) -> None:
        deadline = float("inf")
        while wait(futures, timeout=0.1).not_done:
            mode = self._asked_to_end()
            if mode is not None:
                deadline = min(deadline, time.monotonic() + (0 if mode == "cancel" else self._stop_grace_s))
            if time.monotonic() >= deadline:
                for program in self._running(futures):
                    program.end("cancelled")

    def _running(self, futures: set[Future[HookData]]) -> list[Program]:
        return [program for future, program in self._started.items() if future in futures and not future.done()]

    def _run(self, program: Program, then: Callable[[HookData], None]) -> HookData:
        data = program.run()
        self._reporter.hook(data)
        then(data)
        return data


def _read_tail(output: IO[bytes]) -> str:
    """The last characters, however the program was encoded."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - 4 * _TAIL))
    return output.read().decode(errors="replace")[-_TAIL:]
