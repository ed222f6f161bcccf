"""Earlier versions of an environment, who wrote them, and two people at one environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from account_world import AccountWorld

NEW = {"name": "shared", "model_family": "pixart_sigma", "model_type": "full"}


@pytest.fixture
def world(tmp_path: Any) -> Iterator[AccountWorld]:
    built = AccountWorld(tmp_path)
    built.add_users("lead", "admin")
    built.add_user("other", "lead")
    assert built.ask("POST", "/api/configs/environments", json=NEW, by="lead").status_code == 201
    yield built
    built.close()


def put(world: AccountWorld, rate: float, by: str, if_match: str | None = None) -> Any:
    headers = {} if if_match is None else {"If-Match": if_match}
    read = world.ask("GET", "/api/configs/shared", by=by).json()["config"]
    body = {"config": read | {"--learning_rate": rate}}
    return world.ask("PUT", "/api/configs/shared", json=body, by=by, headers=headers)


def history(world: AccountWorld, **query: str) -> list[dict[str, Any]]:
    return world.ask("GET", "/api/configs/shared/history", params=query, by="lead").json()["versions"]


def test_every_change_is_kept_with_its_author_and_diff(world: AccountWorld) -> None:
    for rate, by in ((0.1, "lead"), (0.2, "other"), (0.3, "lead")):
        assert put(world, rate, by).status_code == 200
    versions = history(world)
    assert [version["author"] for version in versions] == ["lead", "other", "lead", None]
    assert [version["is_current"] for version in versions] == [True, False, False, False]
    assert '-  "--learning_rate": 0.2\n+  "--learning_rate": 0.3' in versions[0]["diff"]
    assert all(line.startswith("+") for line in versions[-1]["diff"].splitlines()[3:])


def test_an_earlier_version_is_restored(world: AccountWorld) -> None:
    put(world, 0.1, "lead")
    first = history(world)[0]["etag"]
    put(world, 0.2, "other")
    bare = first.strip('"')
    seen = world.ask("GET", f"/api/configs/shared/history/{bare}", by="other").json()
    assert seen["content"]["--learning_rate"] == 0.1 and '+  "--learning_rate": 0.2' in seen["diff"]
    stale = world.ask(
        "POST", "/api/configs/shared/restore", json={"etag": first}, by="other", headers={"If-Match": '"old"'}
    )
    assert (stale.status_code, stale.json()["code"]) == (412, "etag_mismatch")
    restored = world.ask("POST", "/api/configs/shared/restore", json={"etag": first}, by="other")
    assert restored.status_code == 200 and restored.headers["ETag"] == first
    assert [(version["author"], version["is_current"]) for version in history(world)][:2] == [
        ("other", True),
        ("other", False),
    ]
    gone = world.ask("POST", "/api/configs/shared/restore", json={"etag": '"nothing"'}, by="lead")
    assert (gone.status_code, gone.json()["code"]) == (404, "not_found")


def test_a_change_by_hand_has_no_author_and_is_not_lost(world: AccountWorld) -> None:
    put(world, 0.1, "lead")
    file = world.workspace / "config/shared/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"--learning_rate": 0.9}))
    assert history(world)[0]["author"] is None
    put(world, 0.2, "other")
    assert [version["author"] for version in history(world)][:2] == ["other", None]
    assert '-  "--learning_rate": 0.9' in history(world)[0]["diff"]


def test_dataset_files_have_a_history_too(world: AccountWorld) -> None:
    read = world.ask("GET", "/api/configs/shared/dataloader", by="lead").json()["content"]
    changed = [read[0] | {"resolution": 512}, *read[1:]]
    assert world.ask("PUT", "/api/configs/shared/dataloader", json=changed, by="other").status_code == 200
    newest, first = history(world, config_type="dataloader")
    assert newest["author"] == "other" and '+    "resolution": 512' in newest["diff"]
    body = {"etag": first["etag"], "config_type": "dataloader"}
    assert world.ask("POST", "/api/configs/shared/restore", json=body, by="lead").status_code == 200
    assert world.ask("GET", "/api/configs/shared/dataloader", by="lead").json()["content"] == read


def test_a_secret_is_in_no_diff(world: AccountWorld) -> None:
    hook = {"webhook_type": "raw", "callback_url": "http://localhost:1/x", "secret": "tell-nobody"}
    body = {"config": {"--model_family": "pixart_sigma", "--webhook_config": hook}}
    assert world.ask("PUT", "/api/configs/shared", json=body, by="lead").status_code == 200
    put(world, 0.1, "lead")
    told = world.ask("GET", "/api/configs/shared/history", by="other").text
    etag = history(world)[1]["etag"].strip('"')
    told += world.ask("GET", f"/api/configs/shared/history/{etag}", by="other").text
    assert "tell-nobody" not in told and "callback_url" in told


def test_of_two_people_nobody_loses_a_change_in_silence(world: AccountWorld) -> None:
    """Both read, both write: the second is told, reads again, and both changes stand; without If-Match it is kept."""
    etag = world.ask("GET", "/api/configs/shared", by="lead").headers["ETag"]
    assert put(world, 0.1, "lead", if_match=etag).status_code == 200
    late = put(world, 0.2, "other", if_match=etag)
    assert (late.status_code, late.json()["code"]) == (412, "etag_mismatch")
    etag = world.ask("GET", "/api/configs/shared", by="other").headers["ETag"]
    assert put(world, 0.2, "other", if_match=etag).status_code == 200
    assert put(world, 0.3, "lead").status_code == 200
    rates = [version["diff"] for version in history(world)]
    assert all(f'+  "--learning_rate": {rate}' in diff for rate, diff in zip((0.3, 0.2, 0.1), rates, strict=False))
