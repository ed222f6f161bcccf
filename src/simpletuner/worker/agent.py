"""What `simpletuner worker` runs: dials out to a server and launches a keeper for each job that it is given."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simpletuner
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import hold_lock
from simpletuner.jobs.devices import Device, read_inventory
from simpletuner.jobs.executor import with_own_code
from simpletuner.worker.assignment import Assignment, RunFolder
from simpletuner.worker.link import JobLink, Link, Refused, Unreachable

log = logging.getLogger(__name__)

POLL_S, SLACK_S = 20.0, 10.0
AGAIN_S = 0.5
RECONNECT_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
UNUSED_S = 7 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """`root` is this worker's own folder."""

    url: str
    token: str
    name: str
    root: Path
    persistent: bool = False
    labels: Mapping[str, str]
    verifies_tls: bool = True
    devices: str = "auto"


class _ToldToGo(Exception):
    """By a signal, while the main thread waits for the server."""


class Agent:
    """`run` until SIGTERM or the server's word. It holds no truth: a new one finds the jobs of the last."""

    def __init__(
        self, settings: WorkerSettings, environ: Mapping[str, str], *, say: Callable[[str], None] = log.info
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._say = say
        self._over = threading.Event()
        self._interruptible = False
        self._keepers: dict[Path, subprocess.Popen[bytes]] = {}
        self._heartbeat_s = 30.0

    def run(self) -> None:
        """Raises Refused where the server will not have this worker, UserError where its folder is another's."""
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, self._on_term)
        root = self._settings.root
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)
        try:
            with hold_lock(root / "agent.lock"):
                self._serve()
        except BlockingIOError as error:
            message = f"Another worker {self._settings.name} runs in {root}."
            hint = "Give this one another --name or --state-dir."
            raise UserError("state_locked", message, hint=hint, exit_code=ExitCode.STORAGE) from error

    def _serve(self) -> None:
        self._tidy()
        link = self._link()
        worker_id = self._patiently(lambda: self._register(link))
        if worker_id is None:
            return
        self._say(f"Worker {self._settings.name} ({worker_id}) is connected to {self._settings.url}.")
        beating = threading.Thread(target=self._beat, args=(worker_id,), daemon=True)
        beating.start()
        while not self._over.is_set():
            messages = self._patiently(lambda: self._poll(link, worker_id))
            news = [self._act(message) for message in messages or ()]
            if news and not any(news):
                # Told again, until the keeper has its lease.
                self._over.wait(AGAIN_S)
        self._leave(link, worker_id)
        link.close()

    def _register(self, link: Link) -> str:
        body = {
            "name": self._settings.name,
            "gpu_info": gpu_info(read_inventory(self._settings.devices, self._environ)),
            "persistent": self._settings.persistent,
            "labels": dict(self._settings.labels),
            "version": simpletuner.__version__,
            "leases": [_lease_of(folder) for folder in self._folders() if folder.is_kept()],
        }
        answer = link.ask("POST", "/api/workers/register", json=body).json()
        self._heartbeat_s = answer["heartbeat_s"]
        return answer["worker_id"]

    def _poll(self, link: Link, worker_id: str) -> list[dict[str, Any]]:
        params = {"worker_id": worker_id, "wait": POLL_S}
        return link.ask("GET", "/api/workers/queue", within_s=POLL_S + SLACK_S, params=params).json()["messages"]

    def _patiently(self, step: Callable[[], Any]) -> Any:
        """Until it works, with longer pauses. None where this worker is to end first."""
        self._interruptible = True
        try:
            return self._retried(step)
        except _ToldToGo:
            return None
        finally:
            self._interruptible = False

    def _retried(self, step: Callable[[], Any]) -> Any:
        tries = 0
        while not self._over.is_set():
            try:
                answer = step()
            except Unreachable as error:
                if tries == 0:
                    self._say(f"The server cannot be reached ({error}): trying again.")
                self._over.wait(RECONNECT_S[min(tries, len(RECONNECT_S) - 1)])
                tries += 1
            else:
                if tries:
                    self._say("The server answers again.")
                return answer
        return None

    def _act(self, message: dict[str, Any]) -> bool:
        """Whether it was news."""
        if message["type"] == "job_submit":
            return self._launch(message)
        if message["type"] == "shutdown":
            self._say("The server has told this worker to end.")
            self._over.set()
        elif message["type"] == "drain":
            self._say("This worker drains: it gets no other job.")
        return True

    def _launch(self, message: dict[str, Any]) -> bool:
        """Given again until the keeper has the lease: one that lives already is left alone."""
        told = {"server_url": self._settings.url, "verifies_tls": self._settings.verifies_tls}
        assignment = Assignment.model_validate(message | told)
        folder = RunFolder(self._settings.root, assignment.job_id, assignment.epoch)
        keeper = self._keepers.get(folder.path)
        try:
            if folder.is_kept() or (keeper is not None and keeper.poll() is None):
                return False
            shutil.rmtree(folder.path, ignore_errors=True)
            folder.write(assignment)
        except OSError as error:
            self._refuse(assignment, f"{self._settings.name} cannot store it: {error.strerror}.")
            return True
        self._say(f"Job {assignment.job_id}, attempt {assignment.attempt}, is being started.")
        self._keepers = {path: other for path, other in self._keepers.items() if other.poll() is None}
        with (folder.path / "keeper.log").open("ab") as output:
            self._keepers[folder.path] = subprocess.Popen(
                [sys.executable, "-m", "simpletuner.worker.keeper", str(folder.path)],
                cwd=folder.path,
                env=self._keeper_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return True

    def _refuse(self, assignment: Assignment, reason: str) -> None:
        """It goes back into the queue at once, and not to this worker for a while."""
        self._say(f"Job {assignment.job_id} is refused: {reason}")
        link = JobLink(assignment)
        try:
            link.ack(accepted=False, reason=reason)
        except (Unreachable, Refused) as error:
            self._say(f"The refusal did not reach the server: {error}")
        link.close()

    def _keeper_environment(self) -> dict[str, str]:
        """The token of this worker is nothing that a trainer needs."""
        kept = {name: value for name, value in self._environ.items() if name != "SIMPLETUNER_WORKER_TOKEN"}
        return with_own_code(kept) | {"SIMPLETUNER_DEVICES": self._settings.devices}

    def _beat(self, worker_id: str) -> None:
        link = self._link()
        while not self._over.wait(self._heartbeat_s):
            busy = any(folder.is_kept() for folder in self._folders())
            body = {"worker_id": worker_id, "status": "busy" if busy else "idle"}
            try:
                link.ask("POST", "/api/workers/heartbeat", json=body)
            except (Unreachable, Refused) as error:
                log.debug("Heartbeat: %s", error)
        link.close()

    def _leave(self, link: Link, worker_id: str) -> None:
        """A persistent worker's jobs go on without it, as a server's do; of any other they end with a checkpoint."""
        if not self._settings.persistent:
            for keeper in self._keepers.values():
                if keeper.poll() is None:
                    keeper.terminate()
            for keeper in self._keepers.values():
                keeper.wait()
        try:
            link.ask("POST", "/api/workers/disconnect", json={"worker_id": worker_id})
        except (Unreachable, Refused) as error:
            self._say(f"Could not say good-bye: {error}")

    def _tidy(self) -> None:
        """Folders of jobs that nobody keeps, and content that none has used for a week."""
        for folder in self._folders():
            if not folder.is_kept():
                shutil.rmtree(folder.path, ignore_errors=True)
        for content in (self._settings.root / "objects").glob("*/*"):
            stat = content.stat()
            if stat.st_nlink == 1 and time.time() - max(stat.st_atime, stat.st_ctime) > UNUSED_S:
                content.unlink(missing_ok=True)

    def _folders(self) -> list[RunFolder]:
        return [RunFolder.at(path) for path in sorted((self._settings.root / "jobs").glob("*-*"))]

    def _link(self) -> Link:
        headers = {"X-Worker-Token": self._settings.token}
        return Link(self._settings.url, headers, verifies_tls=self._settings.verifies_tls)

    def _on_term(self, _signal: int, _frame: object) -> None:
        if self._over.is_set():
            # Told a second time while its jobs are being handed on.
            raise KeyboardInterrupt
        self._over.set()
        if self._interruptible:
            # Out of a call that the server holds open.
            raise _ToldToGo


def gpu_info(devices: list[Device]) -> dict[str, Any]:
    first = devices[0]
    return {
        "name": first.name,
        "count": len(devices),
        "vram_gb": min(device.memory_gb for device in devices),
        "driver": None,
        "accelerator": first.kind,
    }


def _lease_of(folder: RunFolder) -> dict[str, Any]:
    assignment = folder.read()
    size = folder.shipped.stat().st_size if folder.shipped.exists() else 0
    return {"job_id": assignment.job_id, "epoch": assignment.epoch, "journal_offset": size, "alive": True}


def check_url(url: str) -> str:
    """Raises UserError."""
    if not url.startswith(("http://", "https://")):
        message = f"{url!r} is not the address of a server."
        raise UserError("invalid_config", message, hint="Give --orchestrator-url https://…", exit_code=ExitCode.CONFIG)
    return url.rstrip("/")
