"""The torch-free shim around a trainer: `python -m simpletuner.jobs.runner <jobdir>`.

It holds the job's lock for as long as it lives, starts the trainer, carries its output into the journal, enforces
stop and cancel, and writes down how it ended. It knows no server: it outlives one and is found by the next.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from simpletuner.errors import ExitCode
from simpletuner.events import Event, EventType, NoticeData, Severity, read_journal
from simpletuner.job import Command, CommandName, CommandReader, ExitRecord, JobDir, JobSpec
from simpletuner.jobs.escalation import Escalation
from simpletuner.jobs.outcome import HOST_OUT_OF_MEMORY
from simpletuner.jobs.output import OutputPump, Stream
from simpletuner.process import die_with_parent

TRAINER_MODULE = "simpletuner.train"
LOCK_WAIT_S = 1.0
POLL_S = 0.1
ROOM_WAIT_S = 1.0
READ_BYTES = 65536
OUT_OF_MEMORY_HINT = (
    "Nobody asked for it: the kernel kills a process like this when memory runs out. Try a smaller batch, fewer "
    "data workers or a quantised base, and look at `dmesg`."
)


def trainer_command(spec: JobSpec, jobdir: Path, override: str | None) -> list[str]:
    """`override` is a script that stands in for the trainer, for tests of this protocol."""
    if override:
        return [sys.executable, override, str(jobdir)]
    return [sys.executable, *launcher(spec.num_processes), "-m", TRAINER_MODULE, str(jobdir)]


def launcher(num_processes: int) -> list[str]:
    """Arguments of Python before those of a trainer."""
    if num_processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]


@dataclass
class Verdict:
    """What the journal of this attempt says about its own end."""

    error_code: str | None = None
    message: str | None = None
    hint: str | None = None
    exit_code: int | None = None


def trainer_defaults(num_processes: int) -> dict[str, str]:
    """Variables that the environment may override.

    Threads that spin while they wait make a step several times slower as soon as one core has other work.
    """
    found = {"OMP_WAIT_POLICY": "PASSIVE"}
    if num_processes > 1:
        # torchrun would give each rank one thread.
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    return found


class Run:
    """One attempt of one job."""

    def __init__(self, job: JobDir, spec: JobSpec) -> None:
        self._job = job
        self._spec = spec
        self._journal_start = job.journal_path.stat().st_size if job.journal_path.exists() else 0
        self._pump = OutputPump(job.log_path, job.open_journal())
        self._commands = CommandReader(job)
        self._escalation = Escalation(stop_grace_s=spec.stop_grace_s)

    def run(self) -> None:
        """Returns when no process of the trainer is left and `exit.json` says how it went."""
        kills_before = count_memory_kills()
        self._job.forget_rank_errors()
        self._job.reserve_exit()
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)
        trainer = self._spawn()
        self._follow(trainer)
        self._kill_group(trainer, signal.SIGKILL)
        self._drain(trainer)
        self._job.release_exit()
        killed_for_memory = count_memory_kills() > kills_before
        record = self._record(trainer.returncode, killed_for_memory)
        self._pump.finish()
        write_when_possible(self._job, record)

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = trainer_command(self._spec, self._job.root, os.environ.get("SIMPLETUNER_TRAINER"))
        trainer = subprocess.Popen(
            command,
            cwd=self._spec.workspace,
            env=trainer_defaults(self._spec.num_processes) | os.environ | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            process_group=0,
            # Safe here: this process has one thread.
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509
        )
        for pipe in _pipes(trainer):
            os.set_blocking(pipe.fileno(), False)
        return trainer

    def _follow(self, trainer: subprocess.Popen[bytes]) -> None:
        """Until the trainer itself is gone; children that hold its pipes do not keep it alive."""
        wakeup = _wake_on_child()
        open_pipes = list(_pipes(trainer))
        while trainer.poll() is None:
            ready, _, _ = select.select([*open_pipes, wakeup], [], [], POLL_S)
            for pipe in open_pipes:
                if pipe in ready and not self._read(trainer, pipe):
                    open_pipes = [other for other in open_pipes if other is not pipe]
            if wakeup in ready:
                os.read(wakeup, READ_BYTES)
            now = time.monotonic()
            self._pump.flush_due(now)
            for command in self._commands.read():
                self._escalation.request(command.command, now)
            due = self._escalation.next_signal(now)
            if due is not None:
                self._kill_group(trainer, due)

    def _read(self, trainer: subprocess.Popen[bytes], pipe: IO[bytes]) -> bool:
        """False at the end of the pipe."""
        stream: Stream = "stdout" if pipe is trainer.stdout else "stderr"
        try:
            content = os.read(pipe.fileno(), READ_BYTES)
        except BlockingIOError:
            return True
        self._pump.feed(stream, content)
        return bool(content)

    def _drain(self, trainer: subprocess.Popen[bytes]) -> None:
        """What is still in the pipes, without waiting for anyone who may hold them."""
        for pipe in _pipes(trainer):
            while select.select([pipe], [], [], 0)[0] and self._read(trainer, pipe):
                pass

    def _on_term(self, _signal: int, _frame: object) -> None:
        # Through the same file as any other stop: it reaches every rank, and torchrun would turn SIGTERM into 1.
        self._job.send(Command(command=CommandName.STOP, request_id=f"runner-term-{self._spec.attempt}"))

    def _kill_group(self, trainer: subprocess.Popen[bytes], what: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, what)

    def _record(self, returncode: int, killed_for_memory: bool) -> ExitRecord:
        verdict = read_verdict(self._job.journal_path, self._journal_start, attempt=self._spec.attempt)
        if returncode == ExitCode.STORAGE and verdict.error_code is None:
            verdict = self._tell_of_full_disk()
        code, signal_number = (returncode, None) if returncode >= 0 else (None, -returncode)
        if self._spec.num_processes > 1 and code is not None:
            # torchrun ends with 1 whatever its ranks said, and with 0 when they ended as they were asked to.
            verdict = verdict if verdict.exit_code is not None else self._verdict_of_ranks()
            code = verdict.exit_code
        asked = self._escalation.mode is not None
        error_code, message, hint = verdict.error_code, verdict.message, verdict.hint
        if signal_number is not None:
            name = signal.Signals(signal_number).name
            message = message or f"The trainer was ended by {name}."
            if signal_number == signal.SIGKILL and not asked:
                hint = OUT_OF_MEMORY_HINT
                error_code = HOST_OUT_OF_MEMORY if killed_for_memory else error_code
        return ExitRecord(
            code=code,
            signal=signal_number,
            attempt=self._spec.attempt,
            mode=self._escalation.mode,
            forced=self._escalation.forced,
            error_code=error_code,
            message=message,
            hint=hint,
            log_tail=list(self._pump.tail),
        )

    def _verdict_of_ranks(self) -> Verdict:
        """Where the first of them was ended before it could speak."""
        told = self._job.read_rank_error()
        if told is not None:
            verdict = Verdict(told.code, f"Rank {told.rank}: {told.message}", told.hint, told.exit_code)
        else:
            message = f"One of the {self._spec.num_processes} processes of the run ended without a word."
            hint = "Look at the log. The run can go on from its last checkpoint."
            verdict = Verdict("rank_lost", message, hint, ExitCode.OUTSIDE)
        self._speak(verdict)
        return verdict

    def _speak(self, verdict: Verdict) -> None:
        """In the trainer's place: the last line of a journal tells why the run failed."""
        data = NoticeData(code=verdict.error_code or "", hint=verdict.hint or "", exit_code=verdict.exit_code)  # pyright: ignore[reportCallIssue]
        self._pump.last_event = Event(
            type=EventType.ERROR,
            severity=Severity.ERROR,
            title=verdict.error_code or "",
            message=verdict.message or "",
            data=data,
        )

    def _tell_of_full_disk(self) -> Verdict:
        """In the trainer's place: there was no room in the journal for its last words."""
        message, hint = f"The disk of {self._job.root} is full.", "Make room; complete checkpoints are whole."
        verdict = Verdict("disk_full", message, hint, ExitCode.STORAGE)
        self._speak(verdict)
        return verdict


def write_when_possible(job: JobDir, record: ExitRecord, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """A record that is short of room loses its log lines; without any room it waits for some, and the job with it."""
    while True:
        for short in (record, record.model_copy(update={"log_tail": []})):
            try:
                return job.write_exit(short)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
        sleep(ROOM_WAIT_S)


def read_verdict(journal: Path, offset: int, *, attempt: int) -> Verdict:
    verdict = Verdict()
    for _, line in read_journal(journal, offset):
        if b'"error"' not in line and b'"training.status"' not in line:
            continue
        with suppress(ValueError):
            _judge_line(verdict, json.loads(line), attempt)
    return verdict


def _judge_line(verdict: Verdict, event: dict[str, Any], attempt: int) -> None:
    data: dict[str, Any] = event.get("data") or {}
    if event.get("attempt") != attempt:
        return
    if event.get("type") == "error":
        verdict.error_code = data.get("code")
        verdict.message = event.get("message") or None
        verdict.hint = data.get("hint") or None
    if event.get("type") in {"error", "training.status"} and isinstance(data.get("exit_code"), int):
        verdict.exit_code = data["exit_code"]


def count_memory_kills() -> int:
    """How many processes this machine's kernel has killed for lack of memory; 0 where nobody counts."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _pipes(trainer: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if trainer.stdout is None or trainer.stderr is None:
        raise RuntimeError("the trainer was started without pipes")
    return trainer.stdout, trainer.stderr


def _wake_on_child() -> int:
    """A file that turns readable when a child ends, so that its end is seen at once."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, _ignore)
    return reading


def _ignore(_signal: int, _frame: object) -> None:
    """A handler is needed: without one the signal would not reach the wake-up file."""


def _take_lock(job: JobDir, stack: ExitStack) -> bool:
    """Askers hold the lock shared for an instant, so one refusal means nothing."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while time.monotonic() < deadline:
        try:
            stack.enter_context(job.hold_lock())
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return True
    return False


def main(argv: list[str]) -> int:
    job = JobDir(Path(argv[1]))
    with ExitStack() as stack:
        if not _take_lock(job, stack):
            print(f"another runner holds {job.lock_path}", file=sys.stderr)
            return ExitCode.BUG
        spec = job.read_spec()
        try:
            Run(job, spec).run()
        except Exception as error:
            # Whatever breaks here, the supervisor must find how the job ended; the traceback goes on to the log.
            job.write_exit(
                ExitRecord(code=ExitCode.BUG, attempt=spec.attempt, error_code="runner_failed", message=repr(error))
            )
            raise
    return ExitCode.DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
