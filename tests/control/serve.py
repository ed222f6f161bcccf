"""A server process for tests: `serve.py <workspace> <port>`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from simpletuner.errors import UserError
from simpletuner.server.run import run_server
from simpletuner.server.settings import ServerSettings


def main() -> int:
    workspace, port = sys.argv[1:]
    flags = {"workspace": workspace, "port": int(port), "host": "127.0.0.1"}
    try:
        run_server(ServerSettings.read(flags, os.environ, Path.cwd()))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
