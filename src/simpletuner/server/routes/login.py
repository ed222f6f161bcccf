"""The login page for browsers: a plain form, no script (api.md §1.2)."""

from __future__ import annotations

from html import escape
from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

from simpletuner.errors import UserError
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.core import CoreDep
from simpletuner.server.docs import STATIC
from simpletuner.server.errors import STATUS_OF
from simpletuner.server.passwords import MOST_CHARS
from simpletuner.server.rate_limit import LOGIN, RateLimited
from simpletuner.server.rights import limited, public
from simpletuner.server.routes.auth import log_in
from simpletuner.server.security import LOGIN_PAGE, LOGIN_STYLE

router = APIRouter(include_in_schema=False)

AFTERWARDS = "/docs"
NO_ADMIN = (
    "There is no account yet. Make the first admin with POST /api/auth/setup/first-admin, from this server's machine "
    "or with the setup token that it printed at its start."
)
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SimpleTuner: log in</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="{style}"></head>
<body><main><h1>SimpleTuner</h1>{notice}
<form method="post" action="{action}">
<input type="hidden" name="next" value="{next}">
<label>User name or e-mail <input name="username" value="{username}" autocomplete="username" required autofocus></label>
<label>Password <input name="password" type="password" autocomplete="current-password" required></label>
<label><input name="remember_me" type="checkbox" value="true"> Stay logged in for 30 days</label>
<button>Log in</button>
</form></main></body></html>"""


@router.get(LOGIN_PAGE, dependencies=[public()])
def login_page(core: CoreDep, next: Annotated[str, Query(max_length=2000)] = AFTERWARDS) -> HTMLResponse:
    """Leads to `next` afterwards, where that is a path of this server."""
    return _page(next, notice="" if core.accounts.has_admin() else NO_ADMIN)


@router.get(LOGIN_STYLE, dependencies=[public()])
def login_style() -> FileResponse:
    return FileResponse(STATIC / "login.css")


@router.post(LOGIN_PAGE, dependencies=[public(), audits("auth.login"), limited(LOGIN)])
def submit_login(
    core: CoreDep,
    request: Request,
    note: AuditDep,
    username: Annotated[str, Form(max_length=254)],
    password: Annotated[str, Form(max_length=MOST_CHARS)],
    next: Annotated[str, Form(max_length=2000)] = AFTERWARDS,
    remember_me: Annotated[bool, Form()] = False,
) -> Response:
    answer = RedirectResponse(local_path(next), 303)
    try:
        log_in(core, request, answer, note, username, password, long=remember_me)
    except UserError as error:
        headers = error.headers if isinstance(error, RateLimited) else {}
        return _page(next, notice=error.message, username=username, status=STATUS_OF[error.code], headers=headers)
    return answer


def local_path(text: str) -> str:
    """`text`, unless a browser could read it as another server's address."""
    is_local = text.startswith("/") and not text.startswith("//") and "\\" not in text and text.isprintable()
    return text if is_local and not text.startswith(LOGIN_PAGE) else AFTERWARDS


def _page(
    next_path: str, *, notice: str, username: str = "", status: int = 200, headers: dict[str, str] | None = None
) -> HTMLResponse:
    content = PAGE.format(
        style=LOGIN_STYLE,
        action=LOGIN_PAGE,
        next=escape(local_path(next_path)),
        username=escape(username),
        notice=f'<p role="alert">{escape(notice)}</p>' if notice else "",
    )
    # Under the `no-referrer` of all other answers a browser would send the form with `Origin: null`.
    own = {"Cache-Control": "no-store", "Referrer-Policy": "same-origin"}
    return HTMLResponse(content, status, headers=own | (headers or {}))
