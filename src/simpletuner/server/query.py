"""Nothing is silently ignored: a query parameter that an operation does not know is an error."""

from __future__ import annotations

from typing import cast

from fastapi import params
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.requests import HTTPConnection

from simpletuner.errors import Problem, UserError
from simpletuner.server.errors import did_you_mean

CACHE_BUSTER = "_"


async def refuse_unknown_query(connection: HTTPConnection) -> None:
    """A dependency of every route."""
    route = cast(object, connection.scope.get("route"))
    if not connection.query_params or not isinstance(route, APIRoute | APIWebSocketRoute):
        return
    known = {
        field.validation_alias or field.alias
        for field in get_flat_params(route.dependant)
        if isinstance(field.field_info, params.Query)
    }
    unknown = [name for name in connection.query_params if name not in known and name != CACHE_BUSTER]
    if unknown:
        problems = [
            Problem(
                code="unknown_field",
                message=f"Unknown query parameter {name}.",
                hint=did_you_mean(name, known),
                pointer=f"/{name}",
            )
            for name in unknown
        ]
        raise UserError.from_problems(problems, code="unknown_field")
