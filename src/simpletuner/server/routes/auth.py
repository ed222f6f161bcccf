"""First admin, login, registration and password: /api/cloud/auth and /api/auth (api.md §2.1)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from simpletuner.errors import UserError
from simpletuner.server.audit_trail import AuditDep, AuditNote, audits
from simpletuner.server.core import Core, CoreDep, IdentityDep, MaybeIdentityDep
from simpletuner.server.errors import error_responses
from simpletuner.server.passwords import FEWEST_CHARS, MOST_CHARS
from simpletuner.server.rate_limit import LOGIN, PASSWORD, REGISTER, RateLimited
from simpletuner.server.rights import AUTH, count, limited, needs, public
from simpletuner.server.security import session_tokens
from simpletuner.server.session_cookie import clearing_cookie, session_cookie
from simpletuner.server.user_view import UserView, show_identity, show_user
from simpletuner.store.settings import REGISTRATION
from simpletuner.store.users import UserRow, setup_done

router = APIRouter(tags=["auth", "configurations"])

Password = Annotated[str, Field(min_length=FEWEST_CHARS, max_length=MOST_CHARS)]
Username = Annotated[str, Field(min_length=3, max_length=50, pattern=r"^[a-zA-Z0-9_-]+$")]
Email = Annotated[str, Field(max_length=254, pattern=r"^[^@\s]+@[^@\s]+$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewAccount(_Body):
    email: Email = Field(examples=["admin@example.com"])
    username: Username = Field(examples=["admin"])
    password: Password = Field(examples=["your-secure-password"])
    display_name: str | None = Field(default=None, max_length=100)


class FirstAdmin(NewAccount):
    setup_token: str | None = Field(default=None, max_length=64)


class LoginBody(_Body):
    username: str = Field(max_length=254, examples=["admin"])
    password: str = Field(max_length=MOST_CHARS, examples=["your-secure-password"])
    remember_me: bool = False


class NewPassword(_Body):
    current_password: str = Field(max_length=MOST_CHARS)
    new_password: Password


class SetupStatus(BaseModel):
    needs_setup: bool
    has_admin: bool
    user_count: int
    registration_enabled: bool
    setup_token_required: bool


class LoggedIn(BaseModel):
    success: bool = True
    user: UserView
    message: str


class Success(BaseModel):
    success: bool = True


class AuthCheck(BaseModel):
    authenticated: bool
    user_id: str | None = None
    username: str | None = None
    is_admin: bool | None = None
    permissions: list[str] | None = None


@router.get("/setup/status", operation_id="setup_status", dependencies=[public()])
def setup_status(core: CoreDep, identity: MaybeIdentityDep) -> SetupStatus:
    has_admin = core.accounts.has_admin()
    return SetupStatus(
        needs_setup=not has_admin,
        has_admin=has_admin,
        user_count=core.store.users.count(),
        registration_enabled=core.store.settings.get(REGISTRATION, {}).get("enabled", False),
        setup_token_required=not has_admin and identity is None,
    )


@router.post(
    "/setup/first-admin",
    operation_id="create_first_admin",
    status_code=201,
    dependencies=[public(), audits("setup.first_admin")],
    responses=error_responses("setup_token_required", "setup_done", "already_exists"),
)
def create_first_admin(
    core: CoreDep,
    identity: MaybeIdentityDep,
    request: Request,
    response: Response,
    note: AuditDep,
    body: FirstAdmin,
    x_setup_token: Annotated[str | None, Header(max_length=64)] = None,
) -> LoggedIn:
    """Once; from another machine with the setup token that the server printed at its start."""
    if core.accounts.has_admin():
        raise setup_done()
    if identity is None:
        count(request, LOGIN)
        if not core.accounts.setup_token.matches(x_setup_token or body.setup_token):
            hint = "It is on the server's standard error and in the file setup-token of its state directory."
            raise UserError("setup_token_required", "The setup token is missing or wrong.", hint=hint)
    user = core.accounts.create_user(**body.model_dump(exclude={"setup_token"}), levels=["admin"], as_first_admin=True)
    _begin(core, user, request, response, note, long=True)
    return LoggedIn(user=show_user(user), message="The admin was created; the open access from this machine has ended.")


@router.post(
    "/login",
    operation_id="login",
    dependencies=[public(), audits("auth.login"), limited(LOGIN)],
)
def login(core: CoreDep, request: Request, response: Response, note: AuditDep, body: LoginBody) -> LoggedIn:
    """By user name or e-mail address; sets the session's cookie."""
    user = log_in(core, request, response, note, body.username, body.password, long=body.remember_me)
    return LoggedIn(user=show_user(user), message=f"Logged in as {user.username}")


def log_in(
    core: Core, request: Request, response: Response, note: AuditNote, name: str, password: str, *, long: bool
) -> UserRow:
    """Puts the session's cookie into `response`. Raises as `Accounts.log_in`, with that on record."""
    try:
        user = core.accounts.log_in(name, password)
    except UserError as error:
        note.action, note.actor, note.even_refused = "auth.login_failed", name, True
        note.detail = {"reason": "backing off" if isinstance(error, RateLimited) else error.code}
        raise
    _begin(core, user, request, response, note, long=long)
    return user


def _begin(core: Core, user: UserRow, request: Request, response: Response, note: AuditNote, *, long: bool) -> None:
    token, lasts_s = core.accounts.open_session(user, long=long)
    response.headers.append("Set-Cookie", session_cookie(request.scope, token, lasts_s))
    note.actor, note.actor_id, note.target = user.username, str(user.id), user.username


@router.post("/logout", operation_id="logout", dependencies=[public(), audits("auth.logout")])
def logout(core: CoreDep, request: Request, response: Response, note: AuditDep) -> Success:
    """Ends the session of the cookie, if there is one."""
    note.nothing_done = True
    for token in session_tokens(request.headers):
        ended = core.accounts.identify_session(token)
        if ended is not None:
            note.nothing_done, note.actor, note.actor_id = False, ended.name, ended.user_id
        core.accounts.end_session(token)
    response.headers.append("Set-Cookie", clearing_cookie(request.scope))
    return Success()


@router.get("/me", operation_id="get_me", dependencies=[needs(AUTH)])
def get_me(core: CoreDep, identity: IdentityDep) -> UserView:
    return show_identity(core, identity)


@router.get("/check", operation_id="check_auth", dependencies=[public()], response_model_exclude_none=True)
def check_auth(identity: MaybeIdentityDep) -> AuthCheck:
    """Whether the request is somebody's, and what it may do."""
    if identity is None:
        return AuthCheck(authenticated=False)
    return AuthCheck(
        authenticated=True,
        user_id=identity.user_id,
        username=identity.name,
        is_admin=identity.is_admin,
        permissions=sorted(identity.permissions),
    )


@router.post(
    "/register",
    operation_id="register",
    status_code=201,
    dependencies=[public(), audits("auth.register"), limited(REGISTER)],
    responses=error_responses("registration_disabled", "already_exists"),
)
def register(core: CoreDep, request: Request, response: Response, note: AuditDep, body: NewAccount) -> LoggedIn:
    """Where an admin has allowed it."""
    setting: dict[str, Any] = core.store.settings.get(REGISTRATION, {})
    if not setting.get("enabled"):
        raise UserError("registration_disabled", "Nobody can register here.", hint="Ask an admin for an account.")
    user = core.accounts.create_user(**body.model_dump(), levels=[setting["default_level"]])
    _begin(core, user, request, response, note, long=False)
    return LoggedIn(user=show_user(user), message=f"Registered as {user.username}")


@router.post(
    "/change-password",
    operation_id="change_password",
    dependencies=[needs(AUTH), audits("auth.change_password"), limited(PASSWORD)],
)
def change_password(core: CoreDep, identity: IdentityDep, body: NewPassword) -> Success:
    """Other sessions of the user end."""
    core.accounts.change_password(identity, body.current_password, body.new_password)
    return Success()
