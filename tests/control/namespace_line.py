"""A network namespace for a worker; cutting it takes its link down, as pulling a cable does. For root with iproute2."""

from __future__ import annotations

import itertools
import os
import subprocess

_numbers = itertools.count(os.getpid() % 200)


class NamespaceLine:
    """As `FaultyLine`; `prefix` are the words before a command that is to run behind it."""

    def __init__(self, target_port: int) -> None:
        number = next(_numbers) % 250
        self._space, self._link = f"st{number}", f"stv{number}"
        self.host, self.port = f"10.199.{number}.1", target_port
        self.prefix = ["ip", "netns", "exec", self._space]
        _ip("netns", "add", self._space)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "up0", "netns", self._space)
        _ip("addr", "add", f"{self.host}/24", "dev", self._link)
        _ip("link", "set", self._link, "up")
        _ip("-n", self._space, "addr", "add", f"10.199.{number}.2/24", "dev", "up0")
        _ip("-n", self._space, "link", "set", "up0", "up")
        _ip("-n", self._space, "link", "set", "lo", "up")

    def cut(self) -> None:
        _ip("link", "set", self._link, "down")

    def mend(self) -> None:
        _ip("link", "set", self._link, "up")

    def close(self) -> None:
        _ip("netns", "del", self._space)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
