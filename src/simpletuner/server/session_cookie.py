"""The cookie of a session."""

from __future__ import annotations

from starlette.types import Scope

from simpletuner.server.peer import is_secure

SESSION_COOKIE = "simpletuner_session"


def session_cookie(scope: Scope, token: str, lasts_s: int) -> str:
    """The value of `Set-Cookie`; `Secure` only where the request came over https."""
    secure = "; Secure" if is_secure(scope) else ""
    return f"{SESSION_COOKIE}={token}; Max-Age={lasts_s}; Path=/; HttpOnly; SameSite=Lax{secure}"


def clearing_cookie(scope: Scope) -> str:
    return session_cookie(scope, "", 0)
