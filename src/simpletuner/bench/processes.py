"""Servers that are measured: ours, and the barest FastAPI application, each a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

_BARE = """
import sys, uvicorn
from fastapi import FastAPI
app = FastAPI()
@app.get("/health")
def health(): return {"status": "healthy"}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""
_PATIENCE_S = 30.0
_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    port: int
    started_in_s: float
    """From the start of the process to its first answer."""
    process: psutil.Process

    def memory_bytes(self) -> int:
        """Resident, with the processes it has started."""
        everyone = [self.process, *self.process.children(recursive=True)]
        return sum(one.memory_info().rss for one in everyone)


@contextmanager
def serve_bare() -> Generator[Served]:
    port = _free_port()
    with _running([sys.executable, "-c", _BARE, str(port)], port, Path.cwd()) as served:
        yield served


@contextmanager
def serve(workspace: Path) -> Generator[Served]:
    port = _free_port()
    words = [sys.executable, "-m", "simpletuner.cli.main", "server", "--host", "127.0.0.1", "--port", str(port)]
    with _running(words, port, workspace) as served:
        try:
            yield served
        finally:
            httpx2.post(f"{served.url}/api/system/shutdown?jobs=cancel")


@contextmanager
def _running(words: list[str], port: int, folder: Path) -> Generator[Served]:
    started_at = time.perf_counter()
    environment = os.environ | {"SIMPLETUNER_WORKSPACE": str(folder), "SIMPLETUNER_DEVICES": "cpu:1"}
    process = subprocess.Popen(words, cwd=folder, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _await_answer(url, process)
        yield Served(url, port, time.perf_counter() - started_at, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(_PATIENCE_S)


def _await_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(f"{url}/health").is_success:
                return
        except httpx2.TransportError:
            time.sleep(_POLL_S)
    raise RuntimeError(f"no server came up at {url}")


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
