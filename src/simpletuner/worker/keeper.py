"""The runner of a job on a worker: `python -m simpletuner.worker.keeper <run folder>`.

It takes the job's lease, brings what the job needs, has the local runner run it, sends what it says and makes, and
ends it before its lease can be another's. It outlives the agent that started it; its trainer does not outlive it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from simpletuner.errors import ExitCode, UserError
from simpletuner.job import Command, CommandName, ExitRecord
from simpletuner.jobs.devices import read_inventory
from simpletuner.jobs.executor import runner_environment
from simpletuner.process import boottime, die_with_parent, kill_tree
from simpletuner.worker.assignment import Assignment, RunFolder
from simpletuner.worker.fetch import Fetch
from simpletuner.worker.lease_clock import LeaseClock
from simpletuner.worker.link import JobLink, Refused, Unreachable
from simpletuner.worker.ship import OutputSync, Record

TICK_S = 0.1
RETRY_S = 2.0
SHIP_S = 0.2
OUTPUT_S = 1.0
MOST_WAIT_S = 20.0
GIVE_UP_S = 24 * 3600.0
CUT_OFF = "cut_off"
LEAVING = "The worker was told to go, so that it was stopped."
ENDS = frozenset({CommandName.STOP, CommandName.CANCEL, CommandName.YIELD})
CUT_OFF_HINT = "It goes on from its newest checkpoint that reached the server."


class LeaseLost(Exception):
    """The job is not ours any more: nothing may be written or said."""


class AskedToEnd(Exception):
    """Before the trainer was started."""


class Keeper:
    def __init__(self, folder: RunFolder, assignment: Assignment, environ: Mapping[str, str]) -> None:
        self._folder = folder
        self._assignment = assignment
        self._environ = environ
        self._done = threading.Event()
        self._ended = threading.Event()
        self._asked: list[Command] = []
        self._leaving = False

    def run(self) -> None:
        """Returns when the server knows how the job ended, or has given it to somebody else."""
        signal.signal(signal.SIGTERM, self._on_term)
        link = JobLink(self._assignment)
        sent_at = boottime()
        try:
            acked = link.ack(accepted=True)
        except (Refused, Unreachable) as error:
            # It is told again as long as it is ours.
            print(f"The lease was not given: {error}", file=sys.stderr)
            return
        self._clock = LeaseClock(self._assignment.lease_s, sent_at)
        renewing = threading.Thread(target=self._renew, daemon=True)
        renewing.start()
        try:
            self._see_through(link, acked["journal_offset"], acked["log_offset"])
        except LeaseLost:
            return
        except Refused as refused:
            if refused.code not in {"stale_lease", "unknown_job"}:
                raise
        finally:
            self._done.set()
            link.close()

    def _see_through(self, link: JobLink, journal_offset: int, log_offset: int) -> None:
        try:
            self._folder.create_job(self._assignment)
            record = Record(self._folder, self._assignment, journal_offset=journal_offset, log_offset=log_offset)
            Fetch(self._folder, self._assignment, self._check_before).run(link)
        except AskedToEnd:
            self._end(link, self._not_begun())
            return
        except UserError as error:
            self._end(link, _failed(error.code, error.message, error.hint))
            return
        except OSError as error:
            message = f"The worker could not store what the job needs: {error.strerror}."
            self._end(link, _failed("worker_storage", message, "Make room there, or clear its state directory."))
            return
        except Refused as refused:
            if refused.code == "stale_lease":
                raise
            self._end(link, _failed(refused.code, refused.message, refused.hint))
            return
        exit_record = self._run_job(record)
        self._finish(link, record, exit_record)

    def _run_job(self, record: Record) -> ExitRecord:
        """Have the local runner run it, and send what it says meanwhile."""
        for command in self._asked:
            self._folder.job.send(command)
        shipping = [
            threading.Thread(target=self._repeat, args=(SHIP_S, record.send), daemon=True),
            threading.Thread(target=self._repeat, args=(OUTPUT_S, OutputSync(self._folder).checkpoints), daemon=True),
        ]
        runner = self._spawn()
        for thread in shipping:
            thread.start()
        cut_off = self._watch(runner)
        self._ended.set()
        for thread in shipping:
            thread.join()
        if self._clock.is_lost:
            raise LeaseLost
        told = self._folder.job.read_exit() or ExitRecord(code=None, signal=signal.SIGKILL)
        if not cut_off or told.code == ExitCode.DONE or self._is_asked_to_end:
            return told
        message = f"Worker and server lost each other for {cut_off:.0f} s, so that it was stopped."
        if self._leaving:
            message = LEAVING
        changes = {"code": None, "signal": signal.SIGTERM, "mode": None, "forced": False, "error_code": CUT_OFF}
        return told.model_copy(update=changes | {"message": message, "hint": CUT_OFF_HINT})

    def _spawn(self) -> subprocess.Popen[bytes]:
        devices = read_inventory(self._environ.get("SIMPLETUNER_DEVICES", "auto"), self._environ)
        chosen = devices[: self._assignment.spec.num_processes]
        environment = runner_environment(self._environ, chosen, num_slots=len(devices)) | self._assignment.secrets
        with self._folder.job.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "simpletuner.jobs.runner", str(self._folder.job.root)],
                cwd=self._folder.path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509
            )

    def _watch(self, runner: subprocess.Popen[bytes]) -> float:
        """Until it ends. Returns for how long the server had been away when it had to be stopped for that, else 0."""
        cut_off = 0.0
        while runner.poll() is None:
            due = self._clock.due()
            if due == "kill":
                kill_tree(runner.pid)
                cut_off = cut_off or self._clock.age_s
            elif not cut_off and (due == "stop" or self._leaving):
                cut_off = self._clock.age_s
                self._folder.job.send(Command(command=CommandName.STOP, request_id=CUT_OFF))
            self._ended.wait(TICK_S)
        return cut_off

    def _finish(self, link: JobLink, record: Record, exit_record: ExitRecord) -> None:
        """All that was said and made, then how it ended. A job that was cancelled leaves nothing to wait for."""
        if exit_record.mode != "cancel":
            self._insist(partial(OutputSync(self._folder).everything, link))
        self._insist(partial(record.send, link))
        self._end(link, exit_record)

    def _end(self, link: JobLink, exit_record: ExitRecord) -> None:
        self._insist(partial(link.end, exit_record.model_dump(mode="json", exclude={"attempt"})))

    def _insist(self, step: Callable[[], object]) -> None:
        """As long as the server cannot be reached. Raises LeaseLost."""
        deadline = boottime() + GIVE_UP_S
        while True:
            self._check()
            try:
                step()
                return
            except (Unreachable, OSError) as error:
                # Its disk may be full: there is nobody whom waiting for room could harm.
                print(f"Trying again: {error}", file=sys.stderr, flush=True)
                if boottime() > deadline:
                    raise LeaseLost from None
                time.sleep(RETRY_S)

    def _repeat(self, pause_s: float, send: Callable[[JobLink], object]) -> None:
        """While the trainer runs. What fails is tried again; the end sends all that is left."""
        link = JobLink(self._assignment)
        while not self._ended.is_set():
            try:
                send(link)
            except Refused as refused:
                if refused.code == "stale_lease":
                    self._clock.lose()
                    break
                self._ended.wait(RETRY_S)
            except (Unreachable, OSError):
                self._ended.wait(RETRY_S)
            self._ended.wait(pause_s)
        link.close()

    def _renew(self) -> None:
        """In a thread of its own, from the first moment to the last."""
        link = JobLink(self._assignment)
        # Half of what is allowed: a line may be cut for half of the lease just before a renewal is due.
        wait_s = min(MOST_WAIT_S, self._assignment.heartbeat_s, self._assignment.lease_s / 8)
        known: set[str] = set()
        held_s = 0.0
        while not self._done.is_set():
            sent_at = boottime()
            try:
                answer = link.renew(held_s)
            except Unreachable:
                held_s = 0.0
                self._done.wait(min(RETRY_S, self._assignment.lease_s / 20))
                continue
            except Refused:
                self._clock.lose()
                break
            self._clock.renewed(sent_at)
            held_s = wait_s
            for row in answer["commands"]:
                if row["request_id"] not in known and self._obey(Command.model_validate(row)):
                    known.add(row["request_id"])
        link.close()

    def _obey(self, command: Command) -> bool:
        """Whether it was passed on: a full disk must not end the renewals."""
        try:
            if self._folder.job.root.is_dir():
                self._folder.job.send(command)
        except OSError:
            return False
        self._asked.append(command)
        return True

    @property
    def _is_asked_to_end(self) -> bool:
        return any(command.command in ENDS for command in self._asked)

    def _check(self) -> None:
        """Before the trainer runs, and after. Raises LeaseLost."""
        if self._clock.is_lost:
            raise LeaseLost

    def _check_before(self) -> None:
        """Raises LeaseLost, or AskedToEnd."""
        self._check()
        if self._leaving or self._is_asked_to_end:
            raise AskedToEnd

    def _not_begun(self) -> ExitRecord:
        if self._is_asked_to_end:
            return ExitRecord(code=ExitCode.STOPPED, message="It was ended before it began.")
        return ExitRecord(code=None, signal=signal.SIGTERM, error_code=CUT_OFF, message=LEAVING, hint=CUT_OFF_HINT)

    def _on_term(self, _signal: int, _frame: object) -> None:
        self._leaving = True


def _failed(code: str, message: str, hint: str) -> ExitRecord:
    return ExitRecord(code=ExitCode.OUTSIDE, error_code=code, message=message, hint=hint)


def main(argv: list[str]) -> int:
    folder = RunFolder.at(Path(argv[1]))
    with ExitStack() as stack:
        try:
            stack.enter_context(folder.hold())
        except BlockingIOError:
            return ExitCode.DONE
        Keeper(folder, folder.read(), os.environ).run()
    shutil.rmtree(folder.path, ignore_errors=True)
    return ExitCode.DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
