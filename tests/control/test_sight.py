"""What users see of each other's jobs beside the jobs themselves, and what their rights let them ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from account_world import PASSWORD, AccountWorld

from simpletuner.config.webhook import WebhookEndpoint
from simpletuner.job import JobStatus, new_job_id
from simpletuner.server.sight import within_sight
from simpletuner.store.event_filter import EventFilter
from simpletuner.store.job_row import Move, NewJob

LEVELS = ("viewer", "researcher", "lead", "admin")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountWorld]:
    """Each user has one job with a webhook; the researcher's holds the only device."""
    built = AccountWorld(tmp_path_factory.mktemp("sight"))
    built.add_users(*LEVELS)
    built.core.announce_config("demo", "created")
    for name in LEVELS:
        job_id = new_job_id()
        built.core.store.webhooks.register(job_id, [WebhookEndpoint(callback_url="http://localhost:1/")], 0)
        built.core.store.jobs.insert(NewJob(job_id=job_id, output_dir="/nowhere", user_id=str(built.users[name].id)))
    held = job_of(built, "researcher")
    move = Move(job_id=held, from_=JobStatus.QUEUED, to=JobStatus.STARTING, attempt=1, devices=(0,))
    assert built.core.store.jobs.move(move)
    built.core.store.events.relay(event for _, event in built.core.store.outbox.waiting())
    yield built
    built.close()


def job_of(world: AccountWorld, name: str) -> str:
    return world.core.store.jobs.ids(user_id=str(world.users[name].id)).pop()


def get(world: AccountWorld, url: str, **asked: Any) -> Any:
    answer = world.ask("GET", url, **asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(("by", "seen"), [("researcher", {"researcher"}), ("lead", {"lead"}), ("admin", set(LEVELS))])
def test_deliveries_are_their_owners_or_of_all(world: AccountWorld, by: str, seen: set[str]) -> None:
    shown = get(world, "/api/webhooks/deliveries", by=by)["deliveries"]
    assert {row["job_id"] for row in shown} == {job_of(world, name) for name in seen}
    for row in get(world, "/api/webhooks/deliveries", by="admin")["deliveries"]:
        answer = world.ask("POST", f"/api/webhooks/deliveries/{row['id']}/redeliver", by=by)
        own = any(row["job_id"] == job_of(world, name) for name in seen)
        assert answer.status_code == (200 if own else 404), answer.text


def test_deliveries_of_a_job_that_is_seen_and_not_owned(world: AccountWorld) -> None:
    url = f"/api/webhooks/deliveries?job_id={job_of(world, 'admin')}"
    assert world.ask("GET", url, by="lead").json()["code"] == "permission_denied"
    assert world.ask("GET", url, by="researcher").json()["code"] == "unknown_job"


def test_devices_hide_the_jobs_of_others(world: AccountWorld) -> None:
    held = job_of(world, "researcher")
    for by, shown in (("viewer", None), ("researcher", held), ("lead", held)):
        allocation = get(world, "/api/system/status?include_allocation=true", by=by)["gpu_allocation"]
        assert allocation["devices"][0] | {"allocated": True, "job_id": shown} == allocation["devices"][0]
        assert (allocation["allocated_gpus"], allocation["running_local_jobs"]) == ([0], 1)


def test_jobs_are_filtered_by_the_id_or_the_name_of_a_user(world: AccountWorld) -> None:
    for user in ("viewer", "VIEWER", str(world.users["viewer"].id)):
        assert [job["job_id"] for job in get(world, f"/api/jobs?user={user}", by="lead")["jobs"]] == [
            job_of(world, "viewer")
        ]
    assert get(world, "/api/jobs?user=nobody", by="lead")["total"] == 0
    assert get(world, "/api/jobs?user=viewer", by="researcher")["total"] == 0


@pytest.mark.parametrize(
    ("by", "scope", "jobs", "sees_config"),
    [
        ("viewer", None, {"viewer"}, True),
        ("viewer", ["job.*"], {"viewer"}, False),
        ("lead", None, set(LEVELS), True),
        ("lead", ["job.*"], set(LEVELS), False),
        ("admin", None, set(LEVELS), True),
    ],
)
def test_events_of_jobs_and_of_the_server(
    world: AccountWorld, by: str, scope: list[str] | None, jobs: set[str], sees_config: bool
) -> None:
    key = world.make_key(by, scope=scope)
    events = get(world, "/api/training/events", key=key)["events"]
    assert {event.get("job_id") for event in events} - {None} == {job_of(world, name) for name in jobs}
    assert any(event["type"] == "config.updated" for event in events) is sees_config
    identity = world.core.accounts.identify_key(key)
    assert identity is not None
    live = within_sight(world.core, identity, EventFilter())
    everything = world.core.store.events.page(0, EventFilter(), limit=1000).events
    taken = [event.index for event in everything if live.accepts(job_id=event.job_id, type_=event.type)]
    assert taken == [event["index"] for event in events]


def options(world: AccountWorld, **more: Any) -> dict[str, Any]:
    (world.workspace / "pictures").mkdir(exist_ok=True)
    entry = {
        "id": "pictures",
        "type": "local",
        "dataset_type": "image",
        "instance_data_dir": "pictures",
        "resolution": 64,
        "cache_dir_vae": "cache/vae",
    }
    file = world.workspace / "datasets.json"
    file.write_text(json.dumps([entry]))
    given = {"model_family": "pixart_sigma", "model_type": "full", "output_dir": "output/x", "max_train_steps": 9}
    return given | {"data_backend_config": str(file)} | more


def test_validate_warns_of_hooks_that_a_start_refuses(world: AccountWorld) -> None:
    body = options(world, post_checkpoint_script="true {local_checkpoint_path}")
    for by, warned in (("researcher", True), ("admin", False)):
        answer = world.ask("POST", "/api/training/validate", json=body, by=by, headers={"Accept": "application/json"})
        assert answer.json()["valid"]
        codes = [warning["code"] for warning in answer.json()["warnings"]]
        assert ("hook_permission_required" in codes) is warned
        if warned:
            refused = world.ask("POST", "/api/training/start?environment=-", json=body, by=by)
            assert refused.json()["code"] == "hook_permission_required"


@pytest.mark.parametrize(
    ("by", "asked", "given"),
    [
        ("researcher", None, 10),
        ("researcher", 10, 10),
        ("researcher", 11, None),
        ("researcher", 0, 0),
        ("lead", None, 20),
        ("lead", 50, 50),
        ("admin", None, 30),
    ],
)
def test_a_start_has_the_priority_of_its_user(
    world: AccountWorld, by: str, asked: int | None, given: int | None
) -> None:
    query = "" if asked is None else f"&priority={asked}"
    answer = world.ask("POST", f"/api/training/start?environment=-{query}", json=options(world), by=by)
    if given is None:
        assert "job.priority.high" in answer.json()["detail"]
    else:
        assert world.core.job(answer.json()["job_id"]).given_priority == given


def test_a_logout_is_on_record_and_only_of_a_session(world: AccountWorld) -> None:
    login = {"username": "viewer", "password": PASSWORD}
    cookie = world.ask("POST", "/api/auth/login", json=login).headers["set-cookie"].partition(";")[0]
    for headers in ({"Cookie": cookie}, {"Cookie": cookie}, {}):
        assert world.ask("POST", "/api/auth/logout", headers=headers).json() == {"success": True}
    entries = get(world, "/api/audit?action=auth.logout", by="admin")["entries"]
    assert [entry["actor"] for entry in entries] == ["viewer"]
