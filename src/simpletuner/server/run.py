"""Runs a server in this process until it is told to end."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, contextmanager

import uvicorn

from simpletuner.errors import ExitCode, UserError
from simpletuner.process import nothing_is_garbage
from simpletuner.server.app import create_app
from simpletuner.server.core import Core
from simpletuner.server.launch import check_environment, launch_environment
from simpletuner.server.settings import ServerSettings
from simpletuner.server.streams import HEARTBEAT_S

DRAIN_S = 3


def run_server(
    settings: ServerSettings,
    *,
    environ: Mapping[str, str] | None = None,
    environment: str | None = None,
) -> None:
    """Serve until SIGTERM, SIGINT or a shutdown request; jobs run on.

    `environment` is checked before the port opens, then activated and submitted once the server answers. Raises
    UserError: exit code 64 when it would not start or its certificate cannot be used, 69 when the port is in use, 73
    when the state directory is another server's or cannot be written.
    """
    if environment is not None:
        check_environment(settings, environment)
    inherited = os.environ if environ is None else environ
    with _own_state(settings), bind(settings) as listening, ExitStack() as stack:
        with nothing_is_garbage():
            core = stack.enter_context(closing(Core.build(settings, inherited)))
            _prepare_tls(settings)
            server = _Server(settings, core, environment)
        # Of what lives as long as the server nothing need be looked at while requests wait.
        gc.freeze()
        asyncio.run(server.serve(sockets=[listening]))


class _Server(uvicorn.Server):
    """Ends its streams as soon as it is told to go: their listeners would otherwise hold it up."""

    def __init__(self, settings: ServerSettings, core: Core, environment: str | None) -> None:
        self._core = core
        self._app = create_app(settings, core=core, request_shutdown=self._end)
        self._settings = settings
        self._environment = environment
        config = uvicorn.Config(
            self._app,
            log_level=settings.log_level,
            access_log=settings.log_level == "debug",
            # Forwarding headers are believed from nobody: the socket's peer is who asks.
            proxy_headers=False,
            server_header=False,
            ws_ping_interval=HEARTBEAT_S,
            ws_max_size=2**16,
            timeout_graceful_shutdown=DRAIN_S,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(f"SimpleTuner serves {self._settings.url}", file=sys.stderr, flush=True)
            if token := self._core.accounts.prepare_setup():
                print(f"No admin yet. Setup token: {token}", file=sys.stderr, flush=True)
            if self._environment is not None:
                await asyncio.to_thread(launch_environment, self._core, self._environment)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._core.end_waits()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """A signal ends the server well; uvicorn's own way would raise it again and turn that into a failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self) -> None:
        self.should_exit = True


@contextmanager
def _own_state(settings: ServerSettings) -> Generator[None]:
    """One server a state directory; the kernel frees the lock at any death."""
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(settings.state_dir / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        message = f"Cannot write the state directory {settings.state_dir}: {error.strerror}."
        raise UserError("storage", message, hint="Choose another --state-dir.", exit_code=ExitCode.STORAGE) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        message = f"Another server uses the state directory {settings.state_dir}."
        hint = "End it first, or choose another --state-dir."
        raise UserError("state_locked", message, hint=hint, exit_code=ExitCode.STORAGE) from error
    try:
        yield
    finally:
        os.close(handle)


def _prepare_tls(settings: ServerSettings) -> None:
    certfile, keyfile = settings.ssl_certfile, settings.ssl_keyfile
    if certfile is None:
        return
    if settings.makes_certificate and keyfile is not None:
        from simpletuner.server.certificate import prepare_certificate

        prepare_certificate(certfile, keyfile)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
    except OSError as error:
        message = f"The certificate {certfile} cannot be used: {error.strerror or error}."
        hint = "A PEM file with the certificate and its chain, and its key with --ssl-keyfile."
        raise UserError("bad_certificate", message, hint=hint, exit_code=ExitCode.CONFIG) from error


@contextmanager
def bind(settings: ServerSettings) -> Generator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Its protocol is named so that asyncio turns Nagle's delay off: else an answer's body is 40 ms behind its headers.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        message = f"Cannot serve {settings.host}:{settings.port}: {error.strerror}."
        raise UserError("port_in_use", message, hint="Choose another --port.", exit_code=ExitCode.OUTSIDE) from error
    with listening:
        yield listening
