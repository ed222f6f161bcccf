"""From the open server to the first admin, sessions, keys and users who may less."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from control_world import ServerProcess
from fastapi.routing import APIRoute, APIWebSocketRoute, iter_route_contexts

from simpletuner.errors import UserError
from simpletuner.server.app import create_app
from simpletuner.server.permission import PERMISSIONS, holds
from simpletuner.server.rate_limit import LOGIN, LoginBackoff, RateLimited, RateLimiter
from simpletuner.server.rights import AUTH, mark_of
from simpletuner.server.settings import ServerSettings

ADMIN = {"email": "admin@example.com", "username": "admin", "password": "your-secure-password"}
OTHER = {"email": "researcher@example.com", "username": "researcher", "password": "their-password"}


def test_from_open_to_keys_and_levels(server: ServerProcess) -> None:
    auth, http = "/api/cloud/auth", server.http
    open_job = server.start_job()["job_id"]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: http.post(f"{auth}/setup/first-admin", json=ADMIN).status_code, range(20)))
    assert sorted(answers) == [201] + [409] * 19
    http.cookies.clear()
    assert not (server.workspace / ".simpletuner" / "setup-token").exists()
    assert http.get("/api/jobs").status_code == 401
    assert http.post(f"{auth}/login", json={"username": "admin", "password": "wrong"}).status_code == 401
    login = http.post(f"{auth}/login", json={"username": "ADMIN@example.com", "password": ADMIN["password"]})
    cookie = login.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Secure" not in cookie
    made = http.post(f"{auth}/api-keys", json={"name": "automation-key"}).json()
    admin = {"X-API-Key": made["key"]}
    http.cookies.clear()
    assert http.get("/api/training/status", headers=admin).status_code == 200
    assert http.get("/api/training/status", headers=admin | {"Authorization": "Bearer st_x"}).status_code == 401
    assert http.post("/api/users", json=OTHER, headers=admin).json()["levels"][0]["name"] == "researcher"
    assert http.post("/api/users", json=OTHER, headers=admin).status_code == 409
    assert http.post("/api/users", json=OTHER, headers=admin | {"X-API-Key": "st_x"}).status_code == 401
    me = http.get(f"{auth}/me", headers=admin).json()
    assert http.delete(f"/api/users/{me['id']}", headers=admin).json()["code"] == "last_admin"
    assert http.delete(f"/api/users/{me['id']}/levels/admin", headers=admin).json()["code"] == "last_admin"

    http.post("/api/auth/login", json={"username": "researcher", "password": OTHER["password"]})
    assert http.post("/api/users", json=OTHER).json()["code"] == "permission_denied"
    for path in ("", "/config", "/events", "/artifacts", "/logs", "/logs/stream"):
        assert http.get(f"/api/jobs/{open_job}{path}").json()["code"] == "unknown_job"
    for path in ("stop", "cancel", "pause", "resume", "validation", "checkpoint"):
        assert http.post(f"/api/jobs/{open_job}/{path}").json()["code"] == "unknown_job"
    assert http.get("/api/jobs").json()["total"] == 0
    assert {event.get("job_id") for event in server.events()} == {None}
    hook = {"name": "hooked", "config": {"--post_checkpoint_script": "rm {local_checkpoint_path}"}}
    assert http.post("/api/configs", json=hook).json()["code"] == "hook_permission_required"
    http.cookies.clear()
    assert http.delete(f"{auth}/api-keys/{made['key_info']['id']}", headers=admin).status_code == 200
    assert http.get("/api/jobs", headers=admin).status_code == 401
    kept = b"".join(file.read_bytes() for file in (server.workspace / ".simpletuner").glob("*.db*"))
    kept += (server.workspace / "server.log").read_bytes()
    for secret in (made["key"], ADMIN["password"], OTHER["password"]):
        assert secret.encode() not in kept


def test_every_route_says_what_it_needs(tmp_path: Path) -> None:
    app = create_app(ServerSettings.read({}, {}, tmp_path))
    routes = [context.original_route for context in iter_route_contexts(app.routes)]
    marked = [mark_of(route) for route in routes if isinstance(route, APIRoute | APIWebSocketRoute)]
    assert len(marked) > 80
    for permission in {name for mark in marked for name in mark.permissions} - {AUTH}:
        assert holds(PERMISSIONS, permission), permission


def test_limits_slide_and_logins_back_off() -> None:
    now = [0.0]
    limiter, backoff = RateLimiter(lambda: now[0]), LoginBackoff(lambda: now[0])
    for _ in range(LOGIN.most):
        limiter.hit(LOGIN, "a")
    limiter.hit(LOGIN, "b")
    with pytest.raises(RateLimited) as refused:
        limiter.hit(LOGIN, "a")
    assert refused.value.headers["Retry-After"] == "60"
    now[0] = 60.0
    limiter.hit(LOGIN, "a")
    waits: list[int] = []
    for _ in range(12):
        backoff.fail("x")
        try:
            backoff.check("x")
            waits.append(0)
        except UserError as error:
            assert isinstance(error, RateLimited)
            waits.append(int(error.headers["Retry-After"]))
            now[0] += waits[-1]
            backoff.check("x")
    assert waits == [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
