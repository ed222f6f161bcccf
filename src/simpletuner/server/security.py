"""Who is asking (api.md §1.2), before any route is: credentials, open identity, origin, host, rate limits."""

from __future__ import annotations

import asyncio
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simpletuner.errors import UserError
from simpletuner.server.accounts import Accounts
from simpletuner.server.audit_trail import AuditTrail
from simpletuner.server.core import Core
from simpletuner.server.errors import envelope
from simpletuner.server.identity import LOCAL, Identity
from simpletuner.server.negotiation import wants_html_strictly
from simpletuner.server.peer import believe_proxies, host_name, is_direct_loopback, peer_of
from simpletuner.server.rate_limit import ANONYMOUS, AUTHENTICATED, RateLimited, RateLimiter
from simpletuner.server.session_cookie import SESSION_COOKIE, clearing_cookie
from simpletuner.server.settings import ServerSettings

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
PUBLIC_DOCS = frozenset({"/docs", "/redoc", "/openapi.json"})
LOGIN_PAGE = "/login"
LOGIN_STYLE = "/login/style.css"
AUTH_PREFIXES = ("/api/cloud/auth/", "/api/auth/")
AGENT_PREFIXES = ("/api/workers/", "/api/cloud/storage/")
"""Workers and their runners, whose tokens the routes look at; no other credential opens these."""
BEFORE_SETUP = frozenset({"setup/status", "setup/first-admin"})
PUBLIC_AUTH = BEFORE_SETUP | {"login", "logout", "register"}
AUTH_CHECK = "check"
POLICY_VIOLATION = 1008


class Security:
    """Puts an `Identity`, or None for nobody, into the request's state; or answers instead of the application."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        core: Core = scope["app"].state.core
        try:
            scope["state"]["identity"] = await admit(scope, self._settings, core.accounts, core.limiter)
        except UserError as error:
            await _refuse(error, scope, receive, send)
            return
        trail = AuditTrail(core.store.audit, scope)

        async def send_audited(message: Message) -> None:
            if message["type"] == "http.response.start" and trail.is_due(message["status"]):
                await asyncio.to_thread(trail.write)
            await send(message)

        await self._app(scope, receive, send_audited)


async def admit(scope: Scope, settings: ServerSettings, accounts: Accounts, limiter: RateLimiter) -> Identity | None:
    """None for nobody, on paths that let nobody in. Raises UserError where the request may not pass."""
    open_loopback = is_direct_loopback(scope)
    believe_proxies(scope, settings.trusted_networks)
    headers = Headers(scope=scope)
    host = host_name(headers.get("host", ""))
    if settings.allowed_hosts and host not in settings.allowed_hosts:
        raise UserError("host_not_allowed", f"This server does not answer for host {host or '(none)'}.")
    has_admin = accounts.has_admin()
    if scope["path"].startswith(AGENT_PREFIXES):
        _check_origin(scope, headers, settings)
        return None
    is_open = open_loopback and settings.open_loopback and (settings.trust_loopback or not has_admin)
    try:
        identity = await _identify(scope, headers, settings, accounts, is_open=is_open, has_admin=has_admin)
    except UserError:
        # A guess costs as much as any other request of nobody.
        limiter.hit(ANONYMOUS, peer_of(scope))
        raise
    if identity is None:
        limiter.hit(ANONYMOUS, peer_of(scope))
    elif identity.by != "loopback":
        limiter.hit(AUTHENTICATED, identity.quota)
    if identity is None or identity.by != "key":
        _check_origin(scope, headers, settings)
    return identity


async def _identify(
    scope: Scope, headers: Headers, settings: ServerSettings, accounts: Accounts, *, is_open: bool, has_admin: bool
) -> Identity | None:
    """The first credential that is present decides; on public paths none is looked at."""
    path = scope["path"]
    if is_public(path, settings, has_admin=has_admin):
        return LOCAL if is_open else None
    keys, sessions = _keys(headers), session_tokens(headers)
    if keys or sessions:
        found = [await asyncio.to_thread(accounts.identify_key, key) for key in keys]
        found = found or [await asyncio.to_thread(accounts.identify_session, token) for token in sessions]
        if found[0] is None or None in found:
            hint = "It is unknown, has run out or was revoked: log in again, or take another key."
            raise UserError("invalid_credentials", "The credential of this request is not valid.", hint=hint)
        return found[0]
    if is_open:
        return LOCAL
    if has_admin and _auth_route(path) == AUTH_CHECK:
        return None
    hint = (
        "Send X-API-Key, or log in."
        if has_admin
        else "Until an admin exists, only direct requests from this machine to localhost are served."
    )
    raise UserError("unauthenticated", "This request carries no credential.", hint=hint)


def is_public(path: str, settings: ServerSettings, *, has_admin: bool) -> bool:
    if path == "/health" or path.startswith("/health/") or path in {LOGIN_PAGE, LOGIN_STYLE}:
        return True
    if _auth_route(path) in (PUBLIC_AUTH if has_admin else BEFORE_SETUP):
        return True
    return settings.public_docs and (path in PUBLIC_DOCS or path.startswith("/docs/assets/"))


def _auth_route(path: str) -> str | None:
    return next((path.removeprefix(prefix) for prefix in AUTH_PREFIXES if path.startswith(prefix)), None)


def _keys(headers: Headers) -> list[str]:
    """Every value that claims to be a key; one of another kind cannot be valid."""
    bearers = headers.getlist("authorization")
    return [*headers.getlist("x-api-key"), *(_bearer(value) for value in bearers)]


def _bearer(value: str) -> str:
    kind, _, token = value.strip().partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def session_tokens(headers: Headers) -> list[str]:
    cookies = (cookie_parser(value) for value in headers.getlist("cookie"))
    return [found[SESSION_COOKIE] for found in cookies if SESSION_COOKIE in found]


def _check_origin(scope: Scope, headers: Headers, settings: ServerSettings) -> None:
    """A page of another site must not act through a browser's session or this machine's open identity."""
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
    if error.code == "unauthenticated" and _is_page(scope):
        await RedirectResponse(f"{LOGIN_PAGE}?next={quote(_place(scope))}", 303)(scope, receive, send)
        return
    headers = error.headers if isinstance(error, RateLimited) else {}
    if unauthenticated:
        headers = {"WWW-Authenticate": "Bearer"}
        if session_tokens(Headers(scope=scope)):
            headers["Set-Cookie"] = clearing_cookie(scope)
    answer = envelope(scope, code=error.code, detail=error.message, hint=error.hint, headers=headers)
    await answer(scope, receive, send)


def _is_page(scope: Scope) -> bool:
    path = scope["path"]
    is_api = path == "/api" or path.startswith("/api/")
    return scope["method"] == "GET" and not is_api and wants_html_strictly(Headers(scope=scope))


def _place(scope: Scope) -> str:
    query = scope["query_string"].decode("latin-1")
    return f"{scope['path']}?{query}" if query else scope["path"]
