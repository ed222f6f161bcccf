"""`Idempotency-Key` on what is made without a job: one effect, one answer. api.md §1.4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import InProcess

KEY = {"Idempotency-Key": "one"}
ENVIRONMENT = ("/api/configs/environments", {"name": "demo", "model_family": "pixart_sigma"})
FOLDER = ("/api/datasets/folders", {"parent_path": "", "folder_name": "demo"})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InProcess]:
    running = InProcess(tmp_path)
    yield running
    running.close()


@pytest.mark.parametrize(("path", "body"), [ENVIRONMENT, FOLDER])
def test_the_same_request_twice_is_one_effect(server: InProcess, path: str, body: dict[str, Any]) -> None:
    first = server.ask("POST", path, json=body, headers=KEY)
    again = server.ask("POST", path, json=body, headers=KEY)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json() and again.headers["Idempotent-Replayed"] == "true"
    other = server.ask("POST", path, json=body | {next(reversed(body)): "other"}, headers=KEY)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert server.ask("POST", path, json=body).json()["code"] == "already_exists"


@pytest.mark.parametrize(("path", "body"), [ENVIRONMENT, FOLDER])
def test_a_refused_request_gives_its_key_back(server: InProcess, path: str, body: dict[str, Any]) -> None:
    assert server.ask("POST", path, json=body).status_code == 201
    for _ in range(2):
        assert server.ask("POST", path, json=body, headers=KEY).json()["code"] == "already_exists"
    last = list(body)[-1]
    assert server.ask("POST", path, json=body | {"name" if "name" in body else last: "new"}, headers=KEY).is_success


def test_a_key_whose_server_was_killed_is_free_again(server: InProcess) -> None:
    core = server.core
    path, body = FOLDER
    claim = core.store.claims
    assert server.ask("POST", path, json=body, headers=KEY).is_success
    with core.store.database.write() as connection:
        connection.exec_driver_sql("UPDATE idempotency SET answer = NULL")
    assert server.ask("POST", path, json=body, headers=KEY).json()["code"] == "in_flight"
    with core.store.database.write() as connection:
        connection.exec_driver_sql("UPDATE idempotency SET created_at = '2026-01-01T00:00:00.000Z'")
    assert claim is core.store.claims
    assert server.ask("POST", path, json=body, headers=KEY).json()["code"] == "already_exists"
