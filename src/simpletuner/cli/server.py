"""`simpletuner server`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from simpletuner.cli.words import complete_environments
from simpletuner.process import nothing_is_garbage


def server(
    *,
    env: Annotated[str | None, Parameter(completer=complete_environments)] = None,
    host: str | None = None,
    port: int | None = None,
    workspace: str | None = None,
    config_dir: str | None = None,
    state_dir: str | None = None,
    datasets_dir: str | None = None,
    database_url: str | None = None,
    log_level: str | None = None,
    allowed_hosts: str | None = None,
    allowed_origins: str | None = None,
    no_open_loopback: Annotated[bool, Parameter(negative="")] = False,
    trust_loopback: Annotated[bool, Parameter(negative="")] = False,
    trusted_proxies: str | None = None,
    public_docs: Annotated[bool, Parameter(negative="")] = False,
    ssl: Annotated[bool, Parameter(negative="")] = False,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
) -> int:
    """Serve the HTTP API until SIGTERM; running jobs go on without it.

    Parameters
    ----------
    env
        Environment to check before the port opens, and to train as soon as the server answers.
    host
        Address to bind. Variable SIMPLETUNER_HOST; default 0.0.0.0, where only loopback is let in.
    port
        Port to bind. Variable SIMPLETUNER_PORT; default 8001.
    workspace
        Base of relative paths. Variable SIMPLETUNER_WORKSPACE; default: the current directory.
    config_dir
        Environments. Variable SIMPLETUNER_CONFIG_DIR; default: <workspace>/config.
    state_dir
        Database and jobs. Variable SIMPLETUNER_STATE_DIR; default: <workspace>/.simpletuner.
    datasets_dir
        Uploaded datasets. Variables SIMPLETUNER_DATASETS_DIR, DATASETS_DIR; default: <workspace>/datasets.
    database_url
        Another database than the SQLite file in the state directory.
    log_level
        critical, error, warning, info or debug.
    allowed_hosts
        Comma list of Host headers to answer to; others get 400.
    allowed_origins
        Comma list of browser origins to accept beside our own.
    no_open_loopback
        Let nobody in without credentials, not even from this machine.
    trust_loopback
        Let everybody on this machine in without credentials, also after an admin was made.
    trusted_proxies
        Comma list of addresses and networks whose X-Forwarded-For and X-Forwarded-Proto are believed.
    public_docs
        Serve /docs, /redoc and /openapi.json to everybody.
    ssl
        Serve https, with a self-signed certificate that is made at the first start: tls-cert.pem in the state
        directory. Variable SIMPLETUNER_SSL.
    ssl_certfile
        Serve https with this certificate (PEM, with its chain). Variable SIMPLETUNER_SSL_CERTFILE.
    ssl_keyfile
        Its key, where it is not in the same file. Variable SIMPLETUNER_SSL_KEYFILE.
    """
    flags = {
        "host": host,
        "port": port,
        "workspace": workspace,
        "config_dir": config_dir,
        "state_dir": state_dir,
        "datasets_dir": datasets_dir,
        "database_url": database_url,
        "log_level": log_level,
        "allowed_hosts": allowed_hosts,
        "allowed_origins": allowed_origins,
        "no_open_loopback": no_open_loopback or None,
        "trust_loopback": trust_loopback or None,
        "trusted_proxies": trusted_proxies,
        "public_docs": public_docs or None,
        "ssl": ssl or None,
        "ssl_certfile": ssl_certfile,
        "ssl_keyfile": ssl_keyfile,
    }
    with nothing_is_garbage():
        from simpletuner.server.run import run_server
        from simpletuner.server.settings import ServerSettings
    run_server(ServerSettings.read(flags, os.environ, Path.cwd()), environment=env)
    return 0
