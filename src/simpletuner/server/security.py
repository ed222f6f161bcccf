"""Who is asking (api.md §1.2). Until accounts exist there is one identity: the open loopback one."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Literal
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from simpletuner.errors import UserError
from simpletuner.server.errors import envelope
from simpletuner.server.settings import ServerSettings

SESSION_COOKIE = "simpletuner_session"
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
FORWARDING_HEADERS = frozenset({"forwarded", "x-real-ip", "via"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
PUBLIC_DOCS = frozenset({"/docs", "/redoc", "/openapi.json"})
POLICY_VIOLATION = 1008


@dataclass(frozen=True, slots=True)
class Identity:
    user_id: str
    is_admin: bool
    by: Literal["loopback"]

    def may(self, permission: str) -> bool:
        return self.is_admin


LOCAL = Identity(user_id="local", is_admin=True, by="loopback")


class Security:
    """Puts an `Identity` into the request's state, or answers instead of the application."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["identity"] = admit(scope, self._settings)
        except UserError as error:
            await _refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)


def admit(scope: Scope, settings: ServerSettings) -> Identity | None:
    """None on public paths. Raises UserError where the request may not pass."""
    headers = Headers(scope=scope)
    host = _host_name(headers.get("host", ""))
    if settings.allowed_hosts and host not in settings.allowed_hosts:
        raise UserError("host_not_allowed", f"This server does not answer for host {host or '(none)'}.")
    if is_public(scope["path"], settings):
        return None
    if _has_credential(headers):
        hint = "This server has no accounts yet: leave the credential out and ask from this machine."
        raise UserError("invalid_credentials", "The credential of this request is not valid.", hint=hint)
    if not (settings.open_loopback and is_open_loopback(scope)):
        hint = "Until an admin exists, only direct requests from this machine to localhost are served."
        raise UserError("unauthenticated", "This request carries no credential.", hint=hint)
    _check_origin(scope, headers, settings)
    return LOCAL


def is_public(path: str, settings: ServerSettings) -> bool:
    if path == "/health" or path.startswith("/health/"):
        return True
    return settings.public_docs and (path in PUBLIC_DOCS or path.startswith("/docs/assets/"))


def is_open_loopback(scope: Scope) -> bool:
    """The *socket peer* counts: what headers say of another sender only takes the identity away."""
    headers = Headers(scope=scope)
    if any(name in FORWARDING_HEADERS or name.startswith("x-forwarded-") for name in headers):
        return False
    client = scope.get("client")
    return client is not None and _is_loopback(client[0]) and _host_name(headers.get("host", "")) in LOOPBACK_NAMES


def _is_loopback(address: str) -> bool:
    try:
        peer = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped is not None:
        peer = peer.ipv4_mapped
    return peer.is_loopback


def _host_name(host: str) -> str:
    """Without the port; IPv6 keeps its brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[: host.find("]") + 1]
    name, _, port = host.partition(":")
    return name if not port or port.isdigit() else host


def _has_credential(headers: Headers) -> bool:
    if "x-api-key" in headers or "authorization" in headers:
        return True
    return any(_has_session(value) for value in headers.getlist("cookie"))


def _has_session(cookie: str) -> bool:
    try:
        return SESSION_COOKIE in SimpleCookie(cookie)
    except CookieError:
        return SESSION_COOKIE in cookie


def _check_origin(scope: Scope, headers: Headers, settings: ServerSettings) -> None:
    """A page of another site must not act through this machine's open identity."""
    if scope["type"] == "http" and scope["method"] in SAFE_METHODS:
        return
    origin = headers.get("origin")
    known = origin is None or origin.lower() in settings.allowed_origins
    same = origin is not None and urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
    crossing = headers.get("sec-fetch-site") == "cross-site" and not (known and origin is not None)
    if crossing or not (known or same):
        hint = "Add it to --allowed-origins to let its pages use this server."
        raise UserError("origin_not_allowed", f"Origin {origin or '(none)'} may not use this server.", hint=hint)


async def _refuse(error: UserError, scope: Scope, receive: Receive, send: Send) -> None:
    unauthenticated = error.code in {"unauthenticated", "invalid_credentials"}
    if scope["type"] == "websocket":
        await receive()
        if unauthenticated:
            # Only an accepted socket can be closed with a reason that its client sees.
            await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.message[:100]})
        return
    headers: dict[str, str] = {}
    if unauthenticated:
        headers["WWW-Authenticate"] = "Bearer"
        if any(_has_session(value) for value in Headers(scope=scope).getlist("cookie")):
            headers["Set-Cookie"] = f"{SESSION_COOKIE}=; Max-Age=0; Path=/; HttpOnly; SameSite=Lax"
    answer = envelope(scope, code=error.code, detail=error.message, hint=error.hint, headers=headers)
    await answer(scope, receive, send)
