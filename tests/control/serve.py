"""A server process for tests: `serve.py <workspace> <port> [environment]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from simpletuner.errors import UserError
from simpletuner.server.run import run_server
from simpletuner.server.settings import ServerSettings


def main() -> int:
    workspace, port, *environment = sys.argv[1:]
    flags = {"workspace": workspace, "port": int(port), "host": os.environ.get("TEST_HOST", "127.0.0.1")}
    try:
        settings = ServerSettings.read(flags, os.environ, Path.cwd())
        run_server(settings, environment=environment[0] if environment else None)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
