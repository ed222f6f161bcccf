"""Every route against every level and credential, from a table written by hand from api.md §2, column P."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from account_world import AccountWorld
from fastapi.routing import APIRoute, APIWebSocketRoute, iter_route_contexts
from starlette.routing import Route

from simpletuner.job import JobStatus
from simpletuner.run_lock import RunLock, write_lock
from simpletuner.server.audit_trail import Audits
from simpletuner.server.security import SAFE_METHODS
from simpletuner.store.job_row import Move

LEVELS = {
    "viewer": "api.access config.view dataset.view job.view.own queue.view system.view",
    "researcher": "job.submit job.cancel.own job.delete.own queue.cancel.own config.create config.edit.own "
    "config.delete.own config.activate dataset.upload api.keys.own",
    "lead": "job.view.all job.cancel.all job.priority.high queue.view.all queue.cancel.all queue.approve "
    "config.edit.all metrics.read audit.view",
    "admin": "job.hooks queue.manage job.delete.all config.delete.all dataset.delete webhook.manage admin.users "
    "admin.levels admin.settings admin.workers admin.system api.keys.all cloud.manage",
}
TABLE = """
-                GET    /health /health/live /health/ready
-                GET    /api/cloud/auth/setup/status /api/cloud/auth/check
-                POST   /api/cloud/auth/setup/first-admin /api/cloud/auth/login /api/cloud/auth/logout
-                POST   /api/cloud/auth/register /login
-                GET    /login /login/style.css
auth             GET    /docs /redoc /openapi.json
auth             GET    /api/cloud/auth/me /api/cloud/auth/api-keys
auth             POST   /api/cloud/auth/change-password
api.keys.own     POST   /api/cloud/auth/api-keys
api.keys.*       DELETE /api/cloud/auth/api-keys/{key_id}
admin.settings   GET    /api/cloud/settings/registration
admin.settings   PUT    /api/cloud/settings/registration
admin.users      GET    /api/users /api/users/{user_id}
admin.users      POST   /api/users
admin.users      PATCH  /api/users/{user_id}
admin.users      DELETE /api/users/{user_id}
admin.levels     POST   /api/users/{user_id}/levels /api/users/{user_id}/permissions
admin.levels     DELETE /api/users/{user_id}/levels/{name} /api/users/{user_id}/permissions/{name}
auth             GET    /api/users/meta/levels /api/users/meta/permissions /api/users/me/profile
auth             PATCH  /api/users/me/profile
audit.view       GET    /api/audit
config.view      GET    /api/configs /api/configs/examples /api/configs/active /api/configs/schema
config.view      GET    /api/configs/{name} /api/configs/{name}/dataloader /api/configs/{name}/lycoris
config.view      GET    /api/configs/{name}/export /api/configs/{name}/history /api/configs/{name}/history/{etag}
config.view      GET    /api/configs/{name}/ledger
config.view      POST   /api/configs/{name}/validate
config.create    POST   /api/configs /api/configs/environments /api/configs/{name}/copy /api/configs/import
config.activate  POST   /api/configs/{name}/activate /api/configs/{name}/deactivate
config.edit.*    PUT    /api/configs/{name} /api/configs/{name}/dataloader /api/configs/{name}/lycoris
config.edit.*    PATCH  /api/configs/{name}
config.edit.*    POST   /api/configs/{name}/rename /api/configs/{name}/dataloader /api/configs/{name}/restore
config.delete.*  DELETE /api/configs/{name}
config.edit.*    GET    /api/configs/webhooks /api/configs/webhooks/{name}
config.edit.*    POST   /api/configs/webhooks /api/configs/webhooks/{name}/test
config.edit.*    PUT    /api/configs/webhooks/{name}
config.edit.*    DELETE /api/configs/webhooks/{name}
config.view      POST   /api/training/validate
job.submit       POST   /api/training/start
config.edit.*    POST   /api/training/config
job.cancel.*     POST   /api/training/stop /api/training/cancel
job.cancel.*     POST   /api/training/validation/run /api/training/checkpoint/run
job.view.*       GET    /api/training/status /api/training/checkpoints /api/training/checkpoints/validate/{name}
job.view.*       POST   /api/training/checkpoints
job.view.*       GET    /api/training/events /api/training/events/stream
job.view.*       SOCKET /api/training/events/stream
webhook.manage   POST   /api/webhooks/test
job.view.*       GET    /api/webhooks/deliveries
job.view.*       POST   /api/webhooks/deliveries/{delivery_id}/redeliver
dataset.upload   POST   /api/datasets/folders /api/datasets/upload /api/datasets/upload/zip
dataset.upload   POST   /api/datasets/upload/sessions
dataset.upload   PUT    /api/datasets/upload/sessions/{upload_id} /api/datasets/captions
dataset.upload   HEAD   /api/datasets/upload/sessions/{upload_id}
dataset.upload   PATCH  /api/datasets/captions
dataset.view     GET    /api/datasets/browse /api/datasets/detect /api/datasets/thumbnail /api/datasets/captions
dataset.delete   DELETE /api/datasets/files
system.view      GET    /api/system/status
admin.system     POST   /api/system/shutdown
job.view.*       GET    /api/jobs /api/jobs/{job_id} /api/jobs/{job_id}/config /api/jobs/{job_id}/events
job.view.*       GET    /api/jobs/{job_id}/artifacts /api/jobs/{job_id}/artifacts/{artifact_id}
job.view.*       GET    /api/jobs/{job_id}/metrics
metrics.read     GET    /metrics
job.view.*       GET    /api/jobs/{job_id}/logs /api/jobs/{job_id}/logs/stream
job.cancel.*     POST   /api/jobs/{job_id}/stop /api/jobs/{job_id}/cancel /api/jobs/{job_id}/pause
job.cancel.*     POST   /api/jobs/{job_id}/resume /api/jobs/{job_id}/validation /api/jobs/{job_id}/checkpoint
job.delete.*     DELETE /api/jobs/{job_id}
job.submit       POST   /api/jobs/{job_id}/retry /api/queue/submit
queue.view       GET    /api/queue /api/queue/stats /api/queue/me /api/queue/position/{job_id} /api/queue/concurrency
queue.manage     POST   /api/queue/concurrency /api/queue/{job_id}/priority
queue.cancel.*   POST   /api/queue/{job_id}/cancel
queue.approve    POST   /api/queue/{job_id}/approve /api/queue/{job_id}/reject
admin.workers    GET    /api/admin/workers
admin.workers    POST   /api/admin/workers /api/admin/workers/{worker_id}/drain /api/admin/workers/{worker_id}/undrain
admin.workers    POST   /api/admin/workers/{worker_id}/token
admin.workers    PATCH  /api/admin/workers/{worker_id}
admin.workers    DELETE /api/admin/workers/{worker_id}
token            GET    /api/workers/queue /api/workers/stream
token            POST   /api/workers/register /api/workers/heartbeat /api/workers/disconnect
token            POST   /api/workers/job/{job_id}/ack /api/workers/job/{job_id}/lease /api/workers/job/{job_id}/status
token            PUT    /api/workers/job/{job_id}/journal /api/workers/job/{job_id}/log
token            GET    /api/cloud/storage/{job_id}/inputs.json /api/cloud/storage/{job_id}/inputs/{place}/{path:path}
token            PUT    /api/cloud/storage/{job_id}/outputs.json /api/cloud/storage/{job_id}/{path:path}
token            HEAD   /api/cloud/storage/{job_id}/{path:path}
"""
ALIASES = {
    "/api/auth/": "/api/cloud/auth/",
    "/api/cloud/jobs": "/api/jobs",
    "/api/training/stream": "/api/training/events/stream",
    "/api/events": "/api/training/events/stream",
}
UNAUDITED = {
    ("POST", "/api/training/validate"): "changes nothing",
    ("POST", "/api/configs/{name}/validate"): "changes nothing",
    ("POST", "/api/training/checkpoints"): "a list, as by GET",
}
TOKEN = "token"
"""Of workers and their runners, whose own tokens alone open them; what they do is in the journal, not in the audit."""
SCOPE = "job.*"
Asked = tuple[str, str]


def read_table() -> dict[Asked, str]:
    rows = [line.split() for line in TABLE.strip().splitlines()]
    return {(method, path): permission for permission, method, *paths in rows for path in paths}


def canonical(path: str) -> str:
    alias = next((alias for alias in ALIASES if path.startswith(alias)), "")
    return path.replace(alias, ALIASES[alias], 1) if alias else path


def held_by(level: str) -> set[str]:
    names = list(LEVELS)
    return {name for known in names[: names.index(level) + 1] for name in LEVELS[known].split()}


def is_allowed(permission: str, held: set[str]) -> bool:
    return permission == "auth" or any(fnmatchcase(name, permission) for name in held)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountWorld]:
    built = AccountWorld(tmp_path_factory.mktemp("rights"))
    built.add_users(*LEVELS)
    yield built
    built.close()


@pytest.fixture(scope="module")
def routes(world: AccountWorld) -> list[Asked]:
    found: list[Asked] = []
    for context in iter_route_contexts(world.app.routes):
        route = context.original_route
        if isinstance(route, APIWebSocketRoute):
            found.append(("SOCKET", str(context.path)))
        elif isinstance(route, APIRoute | Route):
            found += [(method, str(context.path)) for method in route.methods or () if method != "HEAD"]
    return found


def credentials(world: AccountWorld) -> dict[str, dict[str, str]]:
    """Those that are refused everywhere."""
    accounts = world.core.accounts
    expired, revoked = world.make_key("admin", expires_days=-1), world.make_key("admin")
    made, gone = accounts.open_session(world.users["admin"], long=False)[0], world.make_key("lead")
    identity = accounts.identify_key(revoked)
    assert identity is not None
    accounts.revoke_key(identity.credential_id)
    accounts.end_session(made)
    keys = {"wrong": "st_wrong", "expired": expired, "revoked": revoked}
    bad = {name: {"X-API-Key": key} for name, key in keys.items()}
    bad["two, one wrong"] = {"X-API-Key": gone, "Authorization": "Bearer st_wrong"}
    return bad | {"none": {}, "ended session": {"Cookie": f"simpletuner_session={made}"}}


def url_of(path: str) -> str:
    """With ids of nothing; a stream is asked for a job that is not there, so that it ends."""
    url = re.sub(r"\{\w+_id\}", "987654321", path).replace("{name}", "nothing").replace("{place}", "nothing")
    asks_for_job = "stream" in canonical(path) and "{job_id}" not in path and not path.startswith("/api/workers/")
    return f"{url.replace('{path:path}', 'nothing')}{'?job_id=nothing' if asks_for_job else ''}"


def status(world: AccountWorld, method: str, path: str, headers: dict[str, str]) -> int:
    if method == "SOCKET":
        return socket_status(world, url_of(path), headers)
    return world.ask(method, url_of(path), headers=headers).status_code


def socket_status(world: AccountWorld, url: str, headers: dict[str, str]) -> int:
    """Of the refusal; 1008 where it was closed with a reason."""
    path, _, query = url.partition("?")
    scope: dict[str, Any] = {
        "type": "websocket",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "ws",
        "client": ("10.0.0.1", 1),
        "headers": [
            (b"host", b"localhost"),
            *((key.lower().encode(), value.encode()) for key, value in headers.items()),
        ],
        "subprotocols": [],
        "extensions": {"websocket.http.response": {}},
    }
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    world.loop.run(asyncio.wait_for(world.app(scope, receive, send), 5))
    first = next(message for message in sent if message["type"] != "websocket.accept")
    return int(first.get("status") or first["code"])


def test_every_route_is_in_the_table(routes: list[Asked]) -> None:
    assert len(routes) > 100
    assert {(method, canonical(path)) for method, path in routes} - read_table().keys() == set()


def test_every_route_that_changes_something_is_audited(world: AccountWorld) -> None:
    silent: set[Asked] = set()
    for context in iter_route_contexts(world.app.routes):
        route = context.original_route
        if isinstance(route, APIRoute) and not any(isinstance(mark.dependency, Audits) for mark in route.dependencies):
            silent |= {(method, canonical(str(context.path))) for method in (route.methods or set()) - SAFE_METHODS}
    assert silent == UNAUDITED.keys() | {
        asked for asked, permission in read_table().items() if permission == TOKEN and asked[0] not in SAFE_METHODS
    }


def test_bad_credentials_are_401_before_anything_else(world: AccountWorld, routes: list[Asked]) -> None:
    table = read_table()
    for name, headers in credentials(world).items():
        for method, path in routes:
            is_public = table[method, canonical(path)] == "-"
            found = status(world, method, path, headers)
            if path.endswith("/auth/check"):
                assert found == (200 if name == "none" else 401), name
            else:
                assert (found in {401, 1008}) is not is_public, (name, method, path, found)


@pytest.mark.parametrize("level", LEVELS)
def test_who_lacks_the_permission_is_403_before_anything_else(
    world: AccountWorld, routes: list[Asked], level: str
) -> None:
    table, held = read_table(), held_by(level)
    session = world.core.accounts.open_session(world.users[level], long=False)[0]
    ways = {
        "key": ({"X-API-Key": world.keys[level]}, held),
        "session": ({"Cookie": f"simpletuner_session={session}"}, held),
        "scoped": (
            {"Authorization": f"Bearer {world.make_key(level, scope=[SCOPE])}"},
            {name for name in held if fnmatchcase(name, SCOPE)},
        ),
    }
    for way, (headers, rights) in ways.items():
        for method, path in routes:
            permission = table[method, canonical(path)]
            if permission == TOKEN:
                assert status(world, method, path, headers) == 401, (way, method, path)
            elif permission != "-":
                found = status(world, method, path, headers)
                assert found != 401 and found < 500, (way, method, path, found)
                assert (found != 403) is is_allowed(permission, rights), (way, method, path, found)


def job_requests(world: AccountWorld, job_id: str) -> Iterator[tuple[str, str, Any]]:
    """Every operation of the document that takes a job's id, with that id."""
    for path, operations in world.app.openapi()["paths"].items():
        for method, operation in operations.items():
            url = url_of(path.replace("{job_id}", job_id)).partition("?")[0]
            in_query = any(p["name"] == "job_id" and p["in"] == "query" for p in operation.get("parameters", ()))
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            if read_table().get((method.upper(), path.replace("{path}", "{path:path}"))) == TOKEN:
                continue
            if "{job_id}" in path:
                yield method.upper(), url, None
            elif in_query:
                yield method.upper(), f"{url}?job_id={job_id}", None
            elif "job_id" in content.get("example", {}):
                yield method.upper(), url, {"job_id": job_id}


def canonical_url(url: str, job_id: str) -> str:
    """As the table has it."""
    path = url.partition("?")[0].replace(job_id, "{job_id}").replace("nothing", "{name}")
    return path.replace("artifacts/987654321", "artifacts/{artifact_id}")


def test_the_job_of_another_is_not_there(world: AccountWorld) -> None:
    job_id = world.insert_job(str(world.users["admin"].id)).job_id
    asked = list(job_requests(world, job_id))
    table, held = read_table(), held_by("researcher")
    assert len(asked) > 20
    for method, url, body in asked:
        answers = [world.ask(method, url, json=body, by="researcher")]
        if body:
            answers += [world.ask(method, url, data=body, by="researcher")]
        permission = table[method, canonical_url(url, job_id)]
        told = (404, "unknown_job") if is_allowed(permission, held) else (403, "permission_denied")
        for answer in answers:
            assert (answer.status_code, answer.json()["code"]) == told, (method, url, answer.text)
    assert world.core.job(job_id).status == "queued"
    assert world.ask("GET", f"/api/jobs/{job_id}", by="lead").status_code == 200
    assert world.ask("DELETE", f"/api/jobs/{job_id}", by="lead").json()["code"] == "permission_denied"


def ended_job(world: AccountWorld, user: str, *datasets: dict[str, str]) -> str:
    job_id = world.insert_job(str(world.users[user].id)).job_id
    move = Move(job_id=job_id, from_=JobStatus.QUEUED, to=JobStatus.CANCELLED, attempt=1)
    assert world.core.store.jobs.move(move)
    folder = world.core.placement.job_dir(job_id).root
    folder.mkdir(parents=True)
    (folder / "datasets.json").write_text(json.dumps(datasets))
    return job_id


def write_lock_of(output: Path, job_id: str) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_lock(
        output,
        RunLock(
            job_id=job_id, workspace="", config={}, provenance={}, datasets=[], data={}, versions={}, seed=0, device=""
        ),
    )


def test_an_output_folder_that_others_use_is_kept(world: AccountWorld) -> None:
    """Two jobs of two users wrote into one folder."""
    _, own = ended_job(world, "admin"), ended_job(world, "researcher")
    output = world.workspace / "output" / "demo"
    write_lock_of(output, own)
    url = f"/api/jobs/{own}?purge_output=true"
    assert "job.delete.all" in world.ask("DELETE", url, by="researcher").json()["detail"]
    assert output.is_dir() and world.core.store.jobs.get(own) is not None
    assert world.ask("DELETE", url, by="admin").status_code == 200
    assert not output.exists()


def test_an_output_folder_that_holds_more_than_the_run_is_kept(world: AccountWorld) -> None:
    """Nobody loses pictures because a job named their folder as its output."""
    output = world.workspace / "output" / "demo"
    pictures = output / "pictures"
    pictures.mkdir(parents=True)
    own = ended_job(world, "admin", {"id": "p", "instance_data_dir": str(pictures)})
    stranger = ended_job(world, "admin")
    write_lock_of(output, own)
    for job_id, reason in ((own, "pictures of a dataset"), (stranger, "not made by this job")):
        answer = world.ask("DELETE", f"/api/jobs/{job_id}?purge_output=true", by="admin").json()
        assert answer["code"] == "path_outside_root" and reason in answer["detail"]
    assert pictures.is_dir()
    assert world.ask("DELETE", f"/api/jobs/{own}", by="admin").status_code == 200 and pictures.is_dir()
