"""What a server is told at its start: flags before variables before defaults (api.md §1.7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.config.sources import parse_boolean
from simpletuner.errors import UserError
from simpletuner.jobs.worker_slot import WorkerTimers
from simpletuner.server.peer import Network, parse_networks

DEFAULT_HOST = "0.0.0.0"
DEFAULT_PORT = 8001
DEFAULT_STOP_GRACE_S = 600.0
DEFAULT_AUDIT_DAYS = 90
DEFAULT_UPLOAD_BYTES = 10 << 30
DEFAULT_HEARTBEAT_S = 30.0
DEFAULT_LEASE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Directories are absolute."""

    workspace: Path
    config_dir: Path
    state_dir: Path
    datasets_dir: Path
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    devices: str = "auto"
    database_url: str | None = None
    log_level: str = "info"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    open_loopback: bool = True
    public_docs: bool = False
    trust_loopback: bool = False
    trusted_networks: tuple[Network, ...] = ()
    audit_kept_days: int = DEFAULT_AUDIT_DAYS
    stop_grace_s: float = DEFAULT_STOP_GRACE_S
    webhook_allow_private: bool = True
    max_upload_bytes: int = DEFAULT_UPLOAD_BYTES
    """Of one request, and of one upload in parts."""
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    makes_certificate: bool = False
    preemption: bool = True
    """Whether urgent jobs may have others yield."""
    timers: WorkerTimers = field(default_factory=WorkerTimers)
    worker_secrets: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables of this server that the trainers of workers get."""

    @classmethod
    def read(
        cls, flags: Mapping[str, str | int | bool | None], environ: Mapping[str, str], cwd: Path
    ) -> ServerSettings:
        """`flags` holds what was given on the command line, under these names; absent or None falls through."""
        source = _Source(flags, environ)
        workspace = (cwd / (source.text("workspace") or ".")).resolve()
        config_dir = workspace / (source.text("config_dir") or "config")
        state_dir = workspace / (source.text("state_dir") or ".simpletuner")
        certfile, keyfile, makes_certificate = source.certificate(cwd, state_dir)
        return cls(
            workspace=workspace,
            config_dir=config_dir,
            state_dir=state_dir,
            datasets_dir=workspace / (source.text("datasets_dir") or environ.get("DATASETS_DIR") or "datasets"),
            host=source.text("host") or DEFAULT_HOST,
            port=source.number("port", DEFAULT_PORT),
            devices=environ.get("SIMPLETUNER_DEVICES", "auto"),
            database_url=source.text("database_url"),
            log_level=(source.text("log_level") or "info").lower(),
            allowed_hosts=source.names("allowed_hosts"),
            allowed_origins=source.names("allowed_origins"),
            open_loopback=not flags.get("no_open_loopback"),
            public_docs=bool(flags.get("public_docs")),
            trust_loopback=bool(flags.get("trust_loopback")),
            trusted_networks=parse_networks(source.names("trusted_proxies")),
            audit_kept_days=source.number("audit_retention_days", DEFAULT_AUDIT_DAYS),
            stop_grace_s=float(source.number("stop_grace_s", int(DEFAULT_STOP_GRACE_S))),
            webhook_allow_private=source.switch("webhook_allow_private", default=True),
            max_upload_bytes=source.number("max_upload_bytes", DEFAULT_UPLOAD_BYTES),
            ssl_certfile=certfile,
            ssl_keyfile=keyfile,
            makes_certificate=makes_certificate,
            preemption=source.switch("preemption", default=True),
            timers=source.timers(),
            worker_secrets=source.variables("worker_secrets"),
        )

    @property
    def jobs_root(self) -> Path:
        return self.state_dir / "jobs"

    @property
    def foreground_root(self) -> Path:
        """Jobs of `simpletuner train`."""
        return self.state_dir / "foreground"

    @property
    def uploads_root(self) -> Path:
        """Records of uploads in parts."""
        return self.state_dir / "uploads"

    @property
    def url(self) -> str:
        scheme = "https" if self.ssl_certfile else "http"
        host = "localhost" if self.host in {"0.0.0.0", "::"} else self.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True)
class _Source:
    flags: Mapping[str, str | int | bool | None]
    environ: Mapping[str, str]

    def text(self, name: str) -> str | None:
        flag = self.flags.get(name)
        return str(flag) if flag is not None else self.environ.get(f"SIMPLETUNER_{name.upper()}") or None

    def number(self, name: str, default: int) -> int:
        text = self.text(name)
        try:
            return default if text is None else int(text)
        except ValueError as error:
            message = f"{name} must be a whole number, not {text!r}."
            raise UserError("invalid_config", message, hint=f"For example --{name} {default}.") from error

    def switch(self, name: str, *, default: bool) -> bool:
        text = self.text(name)
        value = default if text is None else parse_boolean(text)
        if value is None:
            raise UserError("invalid_config", f"{name} is on or off, not {text!r}.", hint="Write true or false.")
        return value

    def certificate(self, cwd: Path, state_dir: Path) -> tuple[Path | None, Path | None, bool]:
        """`(certificate, key, whether they are the server's own to make)`; the key may be in the certificate's file."""
        certfile, keyfile = self.text("ssl_certfile"), self.text("ssl_keyfile")
        if certfile is not None:
            return cwd / certfile, cwd / keyfile if keyfile else None, False
        if keyfile is not None:
            raise UserError("invalid_config", "ssl_keyfile is given without ssl_certfile.", hint="Give both.")
        if self.switch("ssl", default=False):
            return state_dir / "tls-cert.pem", state_dir / "tls-key.pem", True
        return None, None, False

    def seconds(self, name: str, default: float) -> float:
        text = self.text(name)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError("invalid_config", f"{name} is a number of seconds, not {text!r}.", hint="For example 30.")
        return value

    def timers(self) -> WorkerTimers:
        """Raises UserError where renewals would come too late (api.md §5)."""
        timers = WorkerTimers(
            self.seconds("heartbeat_s", DEFAULT_HEARTBEAT_S), self.seconds("lease_s", DEFAULT_LEASE_S)
        )
        if timers.heartbeat_s > timers.lease_s / 4:
            message = f"heartbeat_s {timers.heartbeat_s:g} is more than a quarter of lease_s {timers.lease_s:g}."
            raise UserError(
                "invalid_config", message, hint="Raise SIMPLETUNER_LEASE_S or lower SIMPLETUNER_HEARTBEAT_S."
            )
        return timers

    def variables(self, name: str) -> Mapping[str, str]:
        """Those of the environment that the comma list `name` holds."""
        wanted = [part.strip() for part in (self.text(name) or "").split(",") if part.strip()]
        return {variable: self.environ[variable] for variable in wanted if variable in self.environ}

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(part.strip().lower() for part in (self.text(name) or "").split(",") if part.strip())
