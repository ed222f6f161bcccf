"""The outermost layer of every request: its id, the security headers, the one answer to a bug, body limits."""

from __future__ import annotations

import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from simpletuner.server.errors import envelope

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CSP = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": CSP,
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
JSON_BYTES = 2 * 2**20
FORM_BYTES = 4 * 2**20
UPLOADS = frozenset({"/api/datasets/upload", "/api/datasets/upload/zip"})
STORAGE = "/api/cloud/storage/"
UPLOAD_PARTS = "/api/datasets/upload/sessions/"


class Boundary:
    """Wraps the whole application. What escapes from it becomes a 500 that tells nothing but its request id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        scope["path"] = _without_slash(scope["path"])
        answered = False

        async def send_with_headers(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                _add_headers(MutableHeaders(scope=message), scope, request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            # A bug is logged whole and answered in the one error shape; the server goes on.
            log.exception("Request %s failed: %s %s", request_id, scope.get("method", scope["type"]), scope["path"])
            if scope["type"] == "http" and not answered:
                detail = "An internal error occurred. The server's log has it under this request id."
                await envelope(scope, code="internal_error", detail=detail)(scope, receive, send_with_headers)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1011})


class BodyLimit:
    """Counts what is actually received: a length that was not told, or told wrongly, changes nothing.

    Uploads count for themselves, under a limit of their own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_upload(scope):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        content_type = headers.get("content-type", "")
        is_form = content_type.startswith(("multipart/", "application/x-www-form-urlencoded"))
        most = FORM_BYTES if is_form else JSON_BYTES
        detail = f"The body is larger than {most} bytes."
        told = headers.get("content-length", "")
        if told.isdigit() and int(told) > most:
            await envelope(scope, code="body_too_large", detail=detail)(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, detail)
            return message

        await self._app(scope, receive_counted, send)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _is_upload(scope: Scope) -> bool:
    path = scope["path"]
    if path.startswith(STORAGE) and scope["method"] == "PUT":
        return not path.endswith("/outputs.json")
    return path in UPLOADS or (path.startswith(UPLOAD_PARTS) and scope["method"] == "PUT")


def _without_slash(path: str) -> str:
    return path.rstrip("/") or "/"


def _add_headers(headers: MutableHeaders, scope: Scope, request_id: str) -> None:
    headers["X-Request-ID"] = request_id
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)
    if scope["path"].startswith("/api"):
        headers.setdefault("Cache-Control", "no-store")
    if scope["scheme"] in {"https", "wss"}:
        headers.setdefault("Strict-Transport-Security", "max-age=31536000")
