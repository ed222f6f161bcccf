"""Who may pass, as a table; then that every kind of route obeys it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from control_world import ServerProcess
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from simpletuner.errors import UserError
from simpletuner.server.accounts import Accounts
from simpletuner.server.identity import LOCAL
from simpletuner.server.rate_limit import RateLimiter
from simpletuner.server.run import bind
from simpletuner.server.security import admit
from simpletuner.server.settings import ServerSettings
from simpletuner.store.store import Store


def scope(
    *, peer: str = "127.0.0.1", path: str = "/api/jobs", method: str = "GET", kind: str = "http", **headers: str
) -> dict[str, Any]:
    given = {"host": "localhost:8001"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return {
        "type": kind,
        "method": method,
        "path": path,
        "client": (peer, 1),
        "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }


def settings(**flags: Any) -> ServerSettings:
    return ServerSettings.read(flags, {}, Path("/tmp"))


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Accounts]:
    """Without an admin."""
    state = tmp_path_factory.mktemp("state")
    store = Store.open(state)
    yield Accounts(store, state)
    store.close()


def verdict(accounts: Accounts, asked: dict[str, Any], **flags: Any) -> str:
    try:
        return "ok" if asyncio.run(admit(asked, settings(**flags), accounts, RateLimiter())) in {LOCAL, None} else "?"
    except UserError as error:
        return error.code


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (scope(), "ok"),
        (scope(host="127.0.0.1"), "ok"),
        (scope(host="[::1]:9", peer="::1"), "ok"),
        (scope(peer="::ffff:127.0.0.1"), "ok"),
        (scope(peer="127.0.0.9"), "ok"),
        (scope(peer="10.0.0.5"), "unauthenticated"),
        (scope(peer="::ffff:10.0.0.5"), "unauthenticated"),
        (scope(host="evil.example"), "unauthenticated"),
        (scope(host="localhost.evil.example"), "unauthenticated"),
        (scope(host="localhost:8001@evil"), "unauthenticated"),
        (scope(host=""), "unauthenticated"),
        (scope(forwarded="for=1.2.3.4"), "unauthenticated"),
        (scope(x_forwarded_for="127.0.0.1"), "unauthenticated"),
        (scope(x_forwarded_proto="https"), "unauthenticated"),
        (scope(x_real_ip="127.0.0.1"), "unauthenticated"),
        (scope(via="1.1 proxy"), "unauthenticated"),
        (scope(x_api_key="st_x"), "invalid_credentials"),
        (scope(x_api_key=""), "invalid_credentials"),
        (scope(authorization="Bearer st_x"), "invalid_credentials"),
        (scope(cookie="simpletuner_session=x"), "invalid_credentials"),
        (scope(cookie="other=x"), "ok"),
        (scope(path="/health", peer="10.0.0.5", x_api_key="st_x"), "ok"),
        (scope(path="/healthy", peer="10.0.0.5"), "unauthenticated"),
        (scope(path="/docs", peer="10.0.0.5"), "unauthenticated"),
        (scope(origin="http://evil.example"), "ok"),
        (scope(method="POST", origin="http://evil.example"), "origin_not_allowed"),
        (scope(method="POST", origin="http://localhost:3000"), "origin_not_allowed"),
        (scope(method="POST", origin="null"), "origin_not_allowed"),
        (scope(method="DELETE", origin="http://localhost:8001"), "ok"),
        (scope(method="POST", sec_fetch_site="cross-site"), "origin_not_allowed"),
        (scope(method="POST", sec_fetch_site="same-origin"), "ok"),
        (scope(kind="websocket", origin="http://evil.example"), "origin_not_allowed"),
        (scope(kind="websocket"), "ok"),
    ],
)
def test_who_may_pass(accounts: Accounts, asked: dict[str, Any], expected: str) -> None:
    assert verdict(accounts, asked) == expected


def test_flags_open_and_close(accounts: Accounts) -> None:
    assert verdict(accounts, scope(), no_open_loopback=True) == "unauthenticated"
    assert verdict(accounts, scope(path="/docs", peer="10.0.0.5"), public_docs=True) == "ok"
    assert verdict(accounts, scope(host="a.example"), allowed_hosts="b.example") == "host_not_allowed"
    assert verdict(accounts, scope(path="/health", host="a.example"), allowed_hosts="b.example") == "host_not_allowed"
    friend = scope(method="POST", origin="https://ui.example", sec_fetch_site="cross-site")
    assert verdict(accounts, friend, allowed_origins="https://ui.example") == "ok"


def test_every_route_refuses_a_bad_key(shared_server: ServerProcess) -> None:
    document = shared_server.get("/openapi.json")
    for path, operations in document["paths"].items():
        if path.startswith(("/health", "/api/cloud/auth/setup/")):
            continue
        for method in operations:
            url = path.replace("{", "").replace("}", "")
            answer = shared_server.http.request(method.upper(), url, headers={"X-API-Key": "st_wrong"})
            assert answer.status_code == 401, (method, path)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            of_agents = path.startswith(("/api/workers/", "/api/cloud/storage/"))
            code = "unauthenticated" if of_agents else "invalid_credentials"
            assert method == "head" or answer.json()["code"] == code


def test_a_bad_cookie_is_cleared(shared_server: ServerProcess) -> None:
    answer = shared_server.http.get("/api/jobs", headers={"Cookie": "simpletuner_session=old"})
    assert answer.status_code == 401
    assert "Max-Age=0" in answer.headers["set-cookie"]


def test_sockets_are_closed_with_a_reason(shared_server: ServerProcess) -> None:
    url = f"ws://localhost:{shared_server.port}/api/training/events/stream"
    with connect(url, additional_headers={"X-API-Key": "st_wrong"}) as socket:
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=5)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
    with pytest.raises(InvalidStatus) as refused:
        connect(url, origin="http://evil.example")
    assert refused.value.response.status_code == 403


def test_security_headers_are_everywhere(shared_server: ServerProcess) -> None:
    for path in ("/health", "/api/jobs", "/nope", "/docs", "/docs/assets/swagger-ui/swagger-ui.css"):
        headers: httpx2.Headers = shared_server.http.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert (headers.get("Cache-Control") == "no-store") is path.startswith("/api")


def test_answers_are_not_held_back() -> None:
    """asyncio turns Nagle's delay off for sockets whose protocol is named: else a body is 40 ms behind its headers."""
    served = settings(host="127.0.0.1", port=0)
    with bind(served) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as accepted:
            assert accepted.proto == socket.IPPROTO_TCP
