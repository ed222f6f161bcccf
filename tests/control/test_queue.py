"""The queue over HTTP: api.md §2.9. No supervisor runs, and the only device is held: what is submitted waits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from account_world import AccountWorld

from simpletuner.events import Event, EventType, Journal, Progress
from simpletuner.job import JobStatus
from simpletuner.store.job_row import Move

ENTRY = {"id": "p", "type": "local", "dataset_type": "image", "resolution": 64, "cache_dir_vae": "cache/vae"}
OPTIONS = {"model_family": "pixart_sigma", "model_type": "full", "max_train_steps": 9}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountWorld]:
    built = AccountWorld(tmp_path_factory.mktemp("queue"))
    built.add_users("viewer", "researcher", "lead", "admin")
    built.occupy()
    (built.workspace / "pictures").mkdir()
    file = write_datasets(built)
    for name in ("demo", "other"):
        options = OPTIONS | {"output_dir": f"output/{name}-run", "data_backend_config": str(file)}
        config = {f"--{key}": value for key, value in options.items()}
        built.core.environments.create(name, config, {}, None)
    yield built
    built.close()


@pytest.fixture
def world(built: AccountWorld) -> AccountWorld:
    """With nothing in the queue, and nothing set."""
    with built.core.store.database.write() as connection:
        connection.exec_driver_sql("DELETE FROM jobs WHERE status != 'starting'")
        connection.exec_driver_sql("DELETE FROM idempotency")
        connection.exec_driver_sql("DELETE FROM settings")
    built.core.placement.remove_strays()
    write_datasets(built)
    return built


def write_datasets(world: AccountWorld) -> Path:
    file = world.workspace / "datasets.json"
    file.write_text(json.dumps([ENTRY | {"instance_data_dir": str(world.workspace / "pictures")}]))
    return file


def submit(world: AccountWorld, *, by: str = "researcher", headers: Any = None, **more: Any) -> Any:
    body = {"config_name": "demo", **more}
    return world.ask("POST", "/api/queue/submit", json=body, by=by, headers=headers)


def entries(world: AccountWorld, by: str, query: str = "") -> list[dict[str, Any]]:
    return world.ask("GET", f"/api/queue{query}", by=by).json()["entries"]


def test_a_submit_waits_and_says_why(world: AccountWorld) -> None:
    foreseen = submit(world, dry_run=True)
    answer = submit(world)
    body = answer.json()
    assert (answer.status_code, foreseen.status_code) == (202, 200)
    assert foreseen.json() == body | {"job_id": None, "dry_run": True}
    assert (body["status"], body["queue_position"]) == ("queued", 1)
    assert body["reason"] == "1 of at most 1 local jobs are running."
    [entry] = entries(world, "researcher")
    assert (entry["job_id"], entry["priority"], entry["priority_name"]) == (body["job_id"], 10, "normal")
    assert (entry["position"], entry["reason_code"], entry["target"]) == (1, "job_limit", "auto")
    place = world.ask("GET", f"/api/queue/position/{body['job_id']}", by="researcher").json()
    assert (place["position"], place["reason"], place["estimated_wait_seconds"]) == (1, body["reason"], None)


def test_the_wait_is_estimated_where_running_jobs_say_how_long_they_take(world: AccountWorld) -> None:
    [occupant] = world.core.store.jobs.latest_active()
    journal = world.core.placement.job_dir(occupant.job_id).journal_path
    journal.parent.mkdir(exist_ok=True)
    progress = Progress(label="Steps", current=1, total=9, percent=11.1, eta_seconds=120.0, metrics={})
    event = Event(type=EventType.TRAINING_PROGRESS, title="Training", message="Step 1", progress=progress)
    Journal(journal, job_id=occupant.job_id, attempt=1).append(event)
    world.core.store.events.tail(occupant.job_id, journal)
    first, second = submit(world).json()["job_id"], submit(world, config_name="other").json()["job_id"]
    places = [world.ask("GET", f"/api/queue/position/{job}", by="researcher").json() for job in (first, second)]
    assert [place["estimated_wait_seconds"] for place in places] == [120.0, None]


def test_no_wait_leaves_nothing_behind(world: AccountWorld) -> None:
    before = world.core.store.jobs.ids()
    for more in ({"no_wait": True}, {"overrides": {"--num_processes": 5}}):
        answer, foreseen = submit(world, **more), submit(world, dry_run=True, **more)
        body = answer.json()
        assert (answer.status_code, body["code"], body["status"]) == (409, "gpus_unavailable", "rejected")
        assert set(body) == {
            "success", "job_id", "status", "allocated_gpus", "allocated_worker_id", "queue_position",
            "requires_approval", "error", "reason", "detail", "code", "request_id", "hint",
        }  # fmt: skip
        shown = {name: value for name, value in body.items() if name in foreseen.json()}
        assert (foreseen.status_code, foreseen.json()) == (200, shown | {"dry_run": True})
    assert "the largest machine has 1" in body["reason"]
    assert world.core.store.jobs.ids() == before
    assert {path.name for path in world.core.settings.jobs_root.iterdir()} <= before


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"config_name": "none"}, (404, "unknown_config")),
        ({"config_name": "-"}, (404, "unknown_config")),
        ({"target": "kubeflow"}, (422, "unsupported_target")),
        ({"target": "local", "worker_labels": {"gpu": "a*"}}, (422, "invalid_field")),
        ({"for_approval": True, "no_wait": True}, (422, "invalid_field")),
        ({"overrides": {"--learning_rat": 1}}, (422, "invalid_config")),
        ({"overrides": {"accelerate_visible_devices": "one"}}, (422, "invalid_config")),
        ({"overrides": {"post_checkpoint_script": "true"}}, (403, "hook_permission_required")),
        ({"priority": 51}, (422, "invalid_field")),
        ({"priority": 11}, (403, "permission_denied")),
        ({"prio": 1}, (422, "unknown_field")),
        ({"idempotency_key": "a", "headers": {"Idempotency-Key": "b"}}, (422, "invalid_field")),
    ],
)
def test_what_is_refused(world: AccountWorld, more: dict[str, Any], told: tuple[int, str]) -> None:
    for dry_run in (False, True):
        if dry_run and "idempotency_key" in more:
            continue
        answer = submit(world, dry_run=dry_run, **more)
        assert (answer.status_code, answer.json()["code"]) == told, answer.text
    assert entries(world, "researcher") == []


def test_the_order_is_by_priority_and_can_be_changed(world: AccountWorld) -> None:
    first, second = submit(world).json(), submit(world, by="admin", config_name="other").json()
    low = submit(world, overrides={"--output_dir": "output/c"}, priority=0).json()
    names = [entry["job_id"] for entry in entries(world, "lead", "?status=queued")]
    assert names == [second["job_id"], first["job_id"], low["job_id"]]
    url = f"/api/queue/{low['job_id']}/priority"
    assert world.ask("POST", url, json={"priority": 50}, by="lead").status_code == 403
    raised = world.ask("POST", url, json={"priority": 50}, by="admin").json()
    assert (raised["previous_effective_priority"], raised["new_effective_priority"]) == (0, 50)
    top = entries(world, "lead", "?status=queued")[0]
    assert (top["job_id"], top["priority_name"], top["priority_override"]) == (low["job_id"], "critical", 50)
    assert world.ask("POST", url, json={"priority": None}, by="admin").json()["new_effective_priority"] == 10
    assert world.ask("POST", f"/api/queue/{low['job_id']}/cancel", by="researcher").json()["status"] == "cancelled"
    gone = world.ask("POST", url, json={"priority": 5}, by="admin")
    assert (gone.status_code, gone.json()["code"]) == (409, "job_not_waiting")
    again = world.ask("POST", f"/api/queue/{low['job_id']}/cancel", by="researcher")
    assert (again.status_code, again.json()["code"]) == (409, "job_not_running")


def test_approval(world: AccountWorld) -> None:
    asked = [submit(world, for_approval=True, overrides={"--output_dir": f"output/{at}"}).json() for at in range(2)]
    assert [(each["status"], each["requires_approval"]) for each in asked] == [("blocked", True)] * 2
    one, two = (each["job_id"] for each in asked)
    assert {entry["reason_code"] for entry in entries(world, "researcher")} == {"needs_approval"}
    assert world.ask("POST", f"/api/queue/{one}/approve", by="researcher").status_code == 403
    assert world.ask("POST", f"/api/queue/{one}/approve", by="lead").json()["status"] == "queued"
    reason = {"reason": "Not this week."}
    assert world.ask("POST", f"/api/queue/{two}/reject", json=reason, by="lead").json()["status"] == "rejected"
    job = world.ask("GET", f"/api/jobs/{two}", by="researcher").json()["job"]
    assert (job["status"], job["status_reason"]) == ("rejected", "Not this week.")
    for job_id, what in ((one, "approve"), (two, "reject")):
        again = world.ask("POST", f"/api/queue/{job_id}/{what}", by="lead")
        assert (again.status_code, again.json()["code"]) == (409, "job_not_waiting")
    shown = entries(world, "researcher", "?include_completed=true")
    assert [entry["job_id"] for entry in shown] == [one, two]
    assert [entry["job_id"] for entry in entries(world, "researcher", "?status=rejected")] == [two]


def test_everybody_sees_their_own_and_a_lead_sees_all(world: AccountWorld) -> None:
    mine, theirs = submit(world).json()["job_id"], submit(world, by="lead", config_name="other").json()["job_id"]
    assert [entry["job_id"] for entry in entries(world, "researcher")] == [mine]
    assert {mine, theirs} < {entry["job_id"] for entry in entries(world, "lead")}
    for method, url in (("GET", f"position/{theirs}"), ("POST", f"{theirs}/cancel")):
        answer = world.ask(method, f"/api/queue/{url}", by="researcher")
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_job")
    me = world.ask("GET", "/api/queue/me", by="researcher").json()
    assert (me["pending_count"], me["running_count"], me["best_position"]) == (1, 0, 2)
    stats = {by: world.ask("GET", "/api/queue/stats", by=by).json() for by in ("researcher", "lead")}
    assert {body["queue_depth"] for body in stats.values()} == {2}
    assert len(stats["researcher"]["by_user"]) == 1 and len(stats["lead"]["by_user"]) == 3


def test_stats_have_the_shape_of_the_contract(world: AccountWorld) -> None:
    stats = world.ask("GET", "/api/queue/stats", by="viewer").json()
    assert set(stats) == {
        "by_status", "by_user", "queue_depth", "running", "avg_wait_seconds", "max_concurrent", "user_max_concurrent",
        "enable_fair_share", "local_gpu_max_concurrent", "local_job_max_concurrent", "local", "workers",
    }  # fmt: skip
    assert stats["local"] == {
        "running_jobs": 1, "pending_jobs": 0, "allocated_gpus": [0], "available_gpus": [], "total_gpus": 1,
        "max_concurrent_gpus": None, "max_concurrent_jobs": 1,
    }  # fmt: skip


def test_limits_are_kept_and_hold(world: AccountWorld) -> None:
    url = "/api/queue/concurrency"
    before = world.ask("GET", url, by="viewer").json()
    assert before == {
        "success": True, "local_gpu_max_concurrent": None, "local_job_max_concurrent": 1, "max_concurrent": 5,
        "user_max_concurrent": None, "enable_fair_share": False,
    }  # fmt: skip
    assert world.ask("POST", url, json={"local_job_max_concurrent": 2}, by="lead").status_code == 403
    changes = {"local_gpu_max_concurrent": 6, "local_job_max_concurrent": 2, "enable_fair_share": True}
    assert world.ask("POST", url, json=changes, by="admin").json() == before | changes
    unlimited = {"local_gpu_max_concurrent": None, "user_max_concurrent": 1}
    assert world.ask("POST", url, json=unlimited, by="admin").json() == before | changes | unlimited
    for wrong in ({"local_gpu_max_concurrent": 0}, {"max_concurrent": 101}, {"max_concurrent": None}, {"gpus": 1}):
        assert world.ask("POST", url, json=wrong, by="admin").status_code == 422
    assert submit(world).json()["reason"] == "Needs 1 slot(s); 0 of 1 are free."
    limits = world.core.placement.limits()
    assert (limits.max_jobs, limits.max_devices, limits.max_jobs_per_user, limits.fair_share) == (2, None, 1, True)


def test_a_key_makes_one_job(world: AccountWorld) -> None:
    first, again = submit(world, idempotency_key="k"), submit(world, headers={"Idempotency-Key": "k"})
    assert again.json() == first.json() and again.headers["Idempotent-Replayed"] == "true"
    assert submit(world, idempotency_key="k", priority=3).json()["code"] == "idempotency_mismatch"
    assert len(entries(world, "researcher")) == 1


def test_a_job_for_workers_waits_for_one(world: AccountWorld) -> None:
    answer = submit(world, target="worker", worker_labels={"gpu": "a100*"}, overrides={"--num_processes": 8})
    job = world.core.job(answer.json()["job_id"])
    assert answer.json()["reason"] == "Needs a worker with gpu=a100*, 8 devices; none is connected."
    assert (job.worker_labels, job.max_attempts) == ({"gpu": "a100*"}, 3)
    stats = world.ask("GET", "/api/queue/stats", by="viewer").json()
    assert (stats["queue_depth"], stats["local"]["pending_jobs"]) == (1, 0)
    other = submit(world, target="worker", no_wait=True, overrides={"--output_dir": "output/other"})
    assert other.json()["error"] == "No worker"


def ended(world: AccountWorld, job_id: str) -> None:
    assert world.core.store.jobs.move(Move(job_id=job_id, from_=JobStatus.QUEUED, to=JobStatus.CANCELLED, attempt=1))


def test_a_retry_is_the_same_again(world: AccountWorld) -> None:
    first = submit(world, any_gpu=True).json()["job_id"]
    url = f"/api/jobs/{first}/retry"
    early = world.ask("POST", url, by="researcher")
    assert (early.status_code, early.json()["code"]) == (409, "job_not_terminal")
    ended(world, first)
    (world.workspace / "datasets.json").unlink()
    second = world.ask("POST", url, by="researcher")
    assert second.status_code == 202
    job = world.core.job(second.json()["job_id"])
    assert (job.retry_of, job.any_gpu, job.config_name, job.output_dir) == (
        first, True, "demo", world.core.job(first).output_dir,
    )  # fmt: skip
    frozen = [world.core.placement.job_dir(name) for name in (first, job.job_id)]
    assert frozen[0].read_config() == frozen[1].read_config()
    assert frozen[0].read_datasets() == frozen[1].read_datasets()
    assert world.ask("POST", url, by="viewer").status_code == 403


def test_a_retry_with_changes_is_checked_again(world: AccountWorld) -> None:
    first = submit(world).json()["job_id"]
    ended(world, first)
    url = f"/api/cloud/jobs/{first}/retry"
    wrong = world.ask("POST", url, json={"overrides": {"--learning_rate": "much"}}, by="researcher")
    assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid_config")
    asked = {"overrides": {"--max_train_steps": 11}, "resume": False}
    second = world.ask("POST", url, json=asked, by="researcher").json()["job_id"]
    before, after = (world.core.placement.job_dir(name).read_config()["config"] for name in (first, second))
    assert {name for name in after if after[name] != before[name]} == {"max_train_steps", "resume_from_checkpoint"}
    assert (after["max_train_steps"], after["resume_from_checkpoint"]) == (11, None)
