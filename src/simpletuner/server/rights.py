"""Each route says who may use it (api.md §2, column P); one dependency of all routes holds them to it.

Dependencies that only look at the request are coroutines, here and elsewhere: for a plain function the framework takes
a thread, which costs more than all that they do.
"""

from __future__ import annotations

from typing import Any, cast

from fastapi import Depends
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.requests import HTTPConnection

from simpletuner.errors import UserError
from simpletuner.server.identity import Identity
from simpletuner.server.peer import peer_of
from simpletuner.server.permission import ACCESS
from simpletuner.server.rate_limit import Limit, RateLimiter

AUTH = "auth"
"""Any identity."""


class Needs:
    """Marks a route: one of `permissions` is needed, none of a public one. `check_right` and a test read it."""

    def __init__(self, *permissions: str) -> None:
        self.permissions = permissions

    async def __call__(self) -> None:
        """It is in a route's `dependencies` to be found there."""

    def check(self, identity: Identity | None) -> None:
        """Raises UserError `unauthenticated` or `permission_denied`."""
        if not self.permissions:
            return
        if identity is None:
            raise UserError("unauthenticated", "This request carries no credential.", hint="Log in.")
        if AUTH in self.permissions:
            return
        if not identity.has_access:
            raise denied(ACCESS)
        if not any(identity.may(permission) for permission in self.permissions):
            raise denied(" or ".join(self.permissions))


def needs(*permissions: str) -> Any:
    """For a route's `dependencies`: one of these is needed; `job.view.*` is the own or the all of it."""
    return Depends(Needs(*permissions))


def agents() -> Any:
    """For the `dependencies` of a route of workers and runners, which looks at their own tokens (api.md §1.2, 3)."""
    return Depends(Needs())


def public() -> Any:
    """For the `dependencies` of a route that looks at no right."""
    return Depends(Needs())


def denied(permission: str) -> UserError:
    return UserError("permission_denied", f"This needs the permission {permission}.")


def require(identity: Identity, permission: str) -> None:
    """Raises UserError `permission_denied`."""
    if not identity.may(permission):
        raise denied(permission)


def mark_of(route: APIRoute | APIWebSocketRoute) -> Needs:
    """Raises LookupError for a route that says nothing: it is closed to everybody."""
    for dependency in route.dependencies:
        if isinstance(dependency.dependency, Needs):
            return dependency.dependency
    raise LookupError(f"route {route.path} does not say which permission it needs")


async def check_right(connection: HTTPConnection) -> None:
    """The first dependency of every route: who may not, learns nothing of what is wrong with the request."""
    route = cast(object, connection.scope.get("route"))
    if isinstance(route, APIRoute | APIWebSocketRoute):
        mark_of(route).check(connection.scope["state"].get("identity"))


class Limited:
    """Counts a request to its route under a limit of its own; the open loopback identity is exempt."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit

    async def __call__(self, connection: HTTPConnection) -> None:
        identity: Identity | None = connection.scope["state"].get("identity")
        if identity is None or identity.by != "loopback":
            count(connection, self.limit)


def limited(limit: Limit) -> Any:
    """For a route's `dependencies`."""
    return Depends(Limited(limit))


def count(connection: HTTPConnection, limit: Limit) -> None:
    """Raises RateLimited."""
    identity: Identity | None = connection.scope["state"].get("identity")
    limiter: RateLimiter = connection.app.state.core.limiter
    limiter.hit(limit, peer_of(connection.scope) if identity is None else identity.quota)
