"""Whose an environment is, and what a start may write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from account_world import AccountWorld
from httpx2 import Response
from PIL import Image

DATASET = {
    "id": "pictures",
    "type": "local",
    "dataset_type": "image",
    "resolution": 64,
    "cache_dir_vae": "cache/vae",
}
NEW = {"model_family": "pixart_sigma", "create_dataloader": False}
CONFIG = {"--model_family": "pixart_sigma", "--model_type": "full", "--output_dir": "output/demo"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountWorld]:
    built = AccountWorld(tmp_path_factory.mktemp("owners"))
    built.occupy()
    built.add_users("viewer", "researcher", "lead", "admin")
    built.add_user("other", "researcher")
    yield built
    built.close()


def meta(world: AccountWorld, name: str) -> dict[str, Any]:
    return world.ask("GET", f"/api/configs/{name}", by="admin").json()["metadata"]


def make_by_hand(world: AccountWorld, name: str) -> None:
    folder = world.workspace / "config" / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))


def options(world: AccountWorld) -> dict[str, Any]:
    pictures = world.workspace / "pictures"
    pictures.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(pictures / "a.png")
    file = world.workspace / "datasets.json"
    file.write_text(json.dumps([DATASET | {"instance_data_dir": str(pictures)}]))
    return CONFIG | {"--data_backend_config": str(file), "--max_train_steps": 9}


def start(world: AccountWorld, *, environment: str = "-", **asked: Any) -> dict[str, Any]:
    body = options(world) | {"--learning_rate": 0.5}
    answer = world.ask("POST", f"/api/training/start?environment={environment}", json=body, **asked)
    assert answer.status_code == 202, answer.text
    return answer.json()


def test_every_way_to_make_one_records_its_maker(world: AccountWorld) -> None:
    world.ask("POST", "/api/configs/environments", json=NEW | {"name": "made"}, by="admin")
    world.ask("POST", "/api/configs/environments", json=NEW | {"name": "one"}, by="researcher")
    world.ask("POST", "/api/configs", json={"name": "two", "config": CONFIG}, by="researcher")
    world.ask("POST", "/api/configs/made/copy", json={"target_name": "three"}, by="researcher")
    exported = world.ask("GET", "/api/configs/made/export", by="researcher").json()
    world.ask("POST", "/api/configs/import", json={"name": "four", "data": exported}, by="researcher")
    five = start(world, by="researcher")["config_name"]
    assert five.startswith("adhoc-")
    owner = str(world.users["researcher"].id)
    for name in ("one", "two", "three", "four", five):
        assert meta(world, name)["owner"] == owner, name
    assert meta(world, "made")["owner"] == str(world.users["admin"].id)
    trail = world.ask("GET", "/api/audit?actor=researcher", by="admin").json()["entries"]
    made = [(entry["action"], entry["detail"].get("new_name") or entry["target"]) for entry in reversed(trail)]
    assert made[:4] == [
        ("config.create", "one"),
        ("config.create", "two"),
        ("config.copy", "three"),
        ("config.import", "four"),
    ]
    assert (trail[0]["action"], trail[0]["detail"]) == ("job.start", {"environment": five})


def edits(world: AccountWorld, name: str, by: str) -> Iterator[tuple[str, Response]]:
    """Each request that changes an environment; the last two take it away."""
    base = f"/api/configs/{name}"
    imported = {"name": name, "data": CONFIG, "overwrite": True}
    requests: list[tuple[str, str, Any]] = [
        ("PUT", base, {"config": CONFIG}),
        ("PATCH", base, {"config": {"--learning_rate": 0.1}}),
        ("PUT", f"{base}/dataloader", [DATASET | {"instance_data_dir": "pictures"}]),
        ("POST", f"{base}/dataloader", {"overwrite": True}),
        ("PUT", f"{base}/lycoris", {"config": {"algo": "lora"}}),
        ("POST", f"/api/training/config?environment={name}", {"--learning_rate": 0.2}),
        ("POST", "/api/configs/import", imported),
        ("POST", f"{base}/rename", {"new_name": f"{name}-moved"}),
    ]
    for method, url, body in requests:
        yield f"{method} {url}", world.ask(method, url, json=body, by=by)


@pytest.mark.parametrize("maker", ["researcher", None])
@pytest.mark.parametrize(
    ("by", "may_edit_others", "may_delete_others"),
    [("researcher", True, True), ("other", False, False), ("lead", True, False), ("admin", True, True)],
)
def test_who_may_change_one(
    world: AccountWorld, maker: str | None, by: str, may_edit_others: bool, may_delete_others: bool
) -> None:
    name = f"{maker or 'hand'}-{by}"
    if maker is None:
        make_by_hand(world, name)
    else:
        assert world.ask("POST", "/api/configs", json={"name": name, "config": CONFIG}, by=maker).status_code == 201
    may_edit, may_delete = may_edit_others or maker is None, may_delete_others or maker is None
    for what, answer in edits(world, name, by):
        assert (answer.status_code != 403) is may_edit, (what, answer.text)
        assert answer.is_success is may_edit, (what, answer.text)
        if not may_edit:
            assert "config.edit.all" in answer.json()["detail"]
    name = f"{name}-moved" if may_edit else name
    deleted = world.ask("DELETE", f"/api/configs/{name}", by=by)
    assert deleted.status_code == (200 if may_delete else 403), deleted.text


def test_a_start_leaves_what_one_may_not_change(world: AccountWorld) -> None:
    world.ask("POST", "/api/configs", json={"name": "admins", "config": CONFIG}, by="admin")
    world.ask("POST", "/api/configs/admins/activate", by="admin")
    file = world.workspace / "config" / "admins" / "config.json"
    before = file.read_bytes()
    for url_name in ("admins", ""):
        answer = start(world, environment=url_name, by="other")
        assert answer["config_written"] is None
        assert answer["config_name"] == "admins"
        assert [warning["code"] for warning in answer["warnings"]] == ["environment_not_written"]
        job = world.ask("GET", f"/api/jobs/{answer['job_id']}/config", by="other").json()
        assert job["config"]["--learning_rate"] == 0.5
    assert file.read_bytes() == before
    scoped = world.make_key("admin", scope=["job.*"])
    alone = start(world, key=scoped)
    assert alone["config_written"] is None
    assert not (world.workspace / "config" / alone["config_name"]).exists()
    assert world.core.active_environment() == "admins"
    assert start(world, environment="admins", by="lead")["config_written"] == "config/admins/config.json"
    assert file.read_bytes() != before
