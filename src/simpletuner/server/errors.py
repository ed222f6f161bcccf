"""One envelope for every answer that is not a success (api.md §1.3)."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Scope

from simpletuner.errors import Problem, UserError, errors_of
from simpletuner.server.rate_limit import RateLimited

STATUS_OF: Mapping[str, int] = {
    code: status
    for status, codes in {
        400: "no_active_job no_active_environment host_not_allowed bad_path bad_archive",
        401: "unauthenticated invalid_credentials setup_token_required",
        403: "permission_denied hook_permission_required origin_not_allowed path_outside_root registration_disabled",
        404: "not_found unknown_config unknown_job unknown_worker",
        405: "method_not_allowed",
        409: "already_exists setup_done gpus_unavailable environment_active job_not_stepping job_not_running "
        "job_not_waiting job_not_terminal ambiguous_job stale_lease offset_mismatch version_mismatch in_flight "
        "last_admin",
        412: "etag_mismatch",
        413: "body_too_large",
        415: "unsupported_media_type",
        422: "invalid_config invalid_field unknown_field body_required duplicate_key idempotency_mismatch "
        "reserved_name unknown_level unsupported_target nothing_stored",
        429: "rate_limited",
        500: "internal_error",
        501: "not_implemented",
        503: "not_ready too_many_streams",
        507: "disk_full",
    }.items()
    for code in codes.split()
}
CODE_OF: Mapping[int, str] = {
    401: "unauthenticated",
    403: "permission_denied",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}


class ErrorItem(BaseModel):
    pointer: str
    option: str | None = None
    code: str
    message: str
    hint: str = ""


class ErrorBody(BaseModel):
    """What every answer but a success looks like."""

    detail: str
    code: str
    request_id: str
    hint: str | None = None
    errors: list[ErrorItem] | None = None


def request_id_of(scope: Scope) -> str:
    return scope["state"]["request_id"]


def envelope(
    scope: Scope,
    *,
    code: str,
    detail: str,
    hint: str = "",
    problems: Iterable[Problem] = (),
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """`status` only where `code` is not of the table."""
    items = [ErrorItem.model_validate(problem.as_dict()) for problem in problems]
    body = ErrorBody(detail=detail, code=code, request_id=request_id_of(scope), hint=hint or None, errors=items or None)
    content = {name: value for name, value in body.model_dump().items() if value is not None}
    return JSONResponse(content, status or STATUS_OF.get(code, 422), headers=dict(headers or {}))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]}?" if close else ""


def error_responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the answers besides success that an operation gives."""
    by_status: dict[int | str, list[str]] = {}
    for code in codes:
        by_status.setdefault(STATUS_OF[code], []).append(code)
    return {
        status: {"model": ErrorBody, "description": f"{HTTPStatus(int(status)).phrase}: {', '.join(names)}"}
        for status, names in by_status.items()
    }


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(OSError, _on_os_error)


async def _on_user_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, UserError):
        raise error
    problems, code = errors_of(error.problems), error.code
    if code not in STATUS_OF:
        # A finding about a configuration, raised alone: its own code belongs into the list.
        own = Problem(code=code, message=error.message, hint=error.hint, pointer=error.pointer)
        problems, code = problems or [own], "invalid_config"
    headers = error.headers if isinstance(error, RateLimited) else None
    if STATUS_OF[code] == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return envelope(request.scope, code=code, detail=error.message, hint=error.hint, problems=problems, headers=headers)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    # The framework says 400 of a body that cannot be read; here that is a field like any other.
    status = 422 if error.status_code == 400 else error.status_code
    code = CODE_OF.get(status, "invalid_field" if status < 500 else "internal_error")
    detail = error.detail
    if error.status_code == 404 and detail == HTTPStatus.NOT_FOUND.phrase:
        detail = f"There is nothing at {request.url.path}."
    return envelope(request.scope, code=code, detail=detail, status=status, headers=error.headers)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    problems = [_problem(item) for item in error.errors()]
    code = problems[0].code
    return envelope(request.scope, code=code, detail=problems[0].message, hint=problems[0].hint, problems=problems)


async def _on_os_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        detail, hint = "The disk is full; nothing was changed.", "Free some space and try again."
        return envelope(request.scope, code="disk_full", detail=detail, hint=hint)
    raise error


def _problem(item: Mapping[str, Any]) -> Problem:
    """One finding of pydantic. `loc` begins with where it was read: body, query, path or header."""
    loc: Sequence[str | int] = item["loc"]
    where, *path = loc or ("body",)
    pointer = "".join(f"/{part}" for part in path)
    kind, message = str(item["type"]), str(item["msg"])
    if kind == "missing" and where == "body" and not path:
        return Problem(code="body_required", message="This request needs a body.", pointer=pointer)
    if kind == "extra_forbidden":
        return Problem(code="unknown_field", message=f"Unknown field {path[-1]}.", pointer=pointer)
    if kind == "json_invalid":
        reason = item.get("ctx", {}).get("error", message)
        return Problem(code="invalid_field", message=f"The body is not JSON: {reason}.", pointer="")
    name = ".".join(str(part) for part in path) or where
    return Problem(code="invalid_field", message=f"{name}: {message}.", pointer=pointer, option=None)
