"""A process that has imported what many tests start, and forks: a start then costs no imports.

`warm.py SOCKET MODULE…` is that process. What it starts are processes like any other: with their own id, environment,
folder, output and end, by signal too.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

_LONGEST = 2**20


class WarmStart:
    """Starts processes that call `main` of a module, whose arguments are in `sys.argv`."""

    def __init__(self, modules: Sequence[str], environ: Mapping[str, str]) -> None:
        """`environ` is that of the imports."""
        self._place = Path(tempfile.mkdtemp(prefix="warm-"))  # the path of a socket is short
        socket_file = self._place / "socket"
        self.address = str(socket_file)
        self._process = subprocess.Popen([sys.executable, __file__, self.address, *modules], env=dict(environ))
        while not socket_file.exists():
            assert self._process.poll() is None
            time.sleep(0.01)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._place)


class WarmProcess:
    """As much of subprocess.Popen as is needed here."""

    def __init__(
        self,
        address: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        stdout: IO[bytes],
        stderr: IO[bytes],
    ) -> None:
        """`argv` begins with the module."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST)
        self._socket.connect(address)
        asked = json.dumps({"argv": list(argv), "env": dict(env), "cwd": str(cwd)}).encode()
        socket.send_fds(self._socket, [asked], [stdout.fileno(), stderr.fileno()])
        self.pid = int(self._socket.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._socket.settimeout(None if timeout is None else max(timeout, 1e-6))
            try:
                self.returncode = int(self._socket.recv(64))
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from error
            self._socket.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def forsake(self) -> None:
        """As the end of this process would."""
        self._socket.close()


class _Forker:
    """One thread: what it forks has no locks of others in it."""

    def __init__(self, address: str) -> None:
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        complete = Path(address)
        new = complete.with_suffix(".new")
        self._listening.bind(str(new))
        self._listening.listen()
        new.rename(complete)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        wake, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(wake, selectors.EVENT_READ)
        self._asked: dict[int, socket.socket] = {}

    def run(self) -> NoReturn:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listening:
                    self._start(self._listening.accept()[0])
                elif isinstance(key.fileobj, int):
                    os.read(key.fileobj, 4096)
                    self._reap()
                else:
                    self._forsaken(key.data)

    def _start(self, asking: socket.socket) -> None:
        message, descriptors, _, _ = socket.recv_fds(asking, _LONGEST, 2)
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            for own in (self._listening, asking, *self._asked.values()):
                own.close()
            _become(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        asking.send(str(pid).encode())
        self._asked[pid] = asking
        self._selector.register(asking, selectors.EVENT_READ, pid)

    def _reap(self) -> None:
        while self._asked:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            asking = self._asked.pop(pid)
            with suppress(KeyError):  # forsaken
                self._selector.unregister(asking)
            with suppress(OSError):
                asking.send(str(os.waitstatus_to_exitcode(status)).encode())
            asking.close()

    def _forsaken(self, pid: int) -> None:
        """Who asked for it is gone; it itself may have ended in the same moment."""
        if pid in self._asked:
            self._selector.unregister(self._asked[pid])
            os.kill(pid, signal.SIGKILL)


def _become(asked: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, descriptor in enumerate(descriptors, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = asked["argv"]
    code: Any = 1
    try:
        code = importlib.import_module(sys.argv[0]).main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - as the interpreter ends a program
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    _Forker(sys.argv[1]).run()
