"""Random input on every route: never a 5xx, no status that the document does not name, errors of the one shape."""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from control_world import ServerProcess
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case

SKIPPED = {"shutdown", "stream_events", "stream_job_logs", "start_training", "create_first_admin"}
"""They end the server, never end, leave jobs behind, or end the open identity that all others are asked with."""
LAST = "create_user"
"""It may make an admin, which ends the open identity too."""
ADMIN = {"email": "admin@example.com", "username": "admin", "password": "a-long-password"}
RESEARCHER = {"email": "researcher@example.com", "username": "researcher", "password": "a-long-password"}


def headers_of(server: ServerProcess, who: str) -> dict[str, str]:
    """Of a request by `who`. For all but the open identity there are accounts from now on."""
    if who == "open":
        return {}
    assert server.http.post("/api/auth/setup/first-admin", json=ADMIN).status_code == 201
    assert server.http.post("/api/users", json=RESEARCHER).status_code == 201
    server.http.cookies.clear()
    if who == "nobody":
        return {}
    asked = {"username": who, "password": "a-long-password"}
    assert server.http.post("/api/auth/login", json=asked).status_code == 200
    key = server.http.post("/api/auth/api-keys", json={"name": "any input"}).json()["key"]
    server.http.cookies.clear()
    return {"X-API-Key": key}


@pytest.mark.parametrize(("who", "examples"), [("open", 3), ("admin", 1), ("researcher", 1), ("nobody", 1)])
def test_no_input_breaks_a_route(server: ServerProcess, who: str, examples: int) -> None:
    """The variable MORE_INPUTS asks for so many times as many examples."""
    examples *= int(os.environ.get("MORE_INPUTS", "1"))
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]
    operations.sort(key=lambda each: each.definition.raw["operationId"] == LAST)
    headers = headers_of(server, who)
    tried = 0
    for operation in operations:
        if operation.definition.raw["operationId"] in SKIPPED:
            continue
        tried += 1
        documented = {int(status) for status in operation.definition.raw["responses"]}
        _try(server, operation.as_strategy(), documented, headers, examples)
    assert tried > 80


def _try(
    server: ServerProcess, cases: st.SearchStrategy[Case], documented: set[int], headers: dict[str, str], examples: int
) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def check(case: Case) -> None:
        if "wait" in (case.query or {}):
            case.query = {name: value for name, value in case.query.items() if name != "wait"}
        answer = case.call(base_url=server.url, headers=headers)
        told = f"{case.as_curl_command()}\n{answer.status_code} {answer.text}"
        assert answer.status_code < 500 or answer.status_code == 501, told
        assert answer.status_code in documented, told
        is_html = "html" in answer.headers.get("content-type", [""])[0]
        if answer.status_code >= 400 and case.method != "HEAD" and not is_html:
            body = answer.json()
            assert {"detail", "code", "request_id"} <= body.keys()

    check()
