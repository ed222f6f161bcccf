"""The application without a socket: a server in this process, asked as from this machine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx2
from control_world import SOURCE

from simpletuner.server.app import create_app
from simpletuner.server.core import Core
from simpletuner.server.settings import ServerSettings


class InProcess:
    """Its supervisor does not run: for routes that start nothing."""

    def __init__(self, workspace: Path, **environ: str) -> None:
        environ = dict(os.environ) | {"PYTHONPATH": str(SOURCE), "SIMPLETUNER_DEVICES": "cpu:1"} | environ
        self.settings = ServerSettings.read({}, environ, workspace)
        self.core = Core.build(self.settings, environ)
        self.datasets = self.settings.datasets_dir
        app = create_app(self.settings, core=self.core)
        app.state.core = self.core
        self._runner = asyncio.Runner()
        self._http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost")

    def ask(self, method: str, path: str, **more: Any) -> httpx2.Response:
        return self._runner.run(self._http.request(method, path, **more))

    def close(self) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()
        self.core.close()

    def files(self) -> dict[str, bytes]:
        """All that is in the datasets folder, hidden files and folders too; a folder has no bytes."""
        return {
            path.relative_to(self.datasets).as_posix(): path.read_bytes() if path.is_file() else b""
            for path in sorted(self.datasets.rglob("*"))
        }
