"""Which workers live and what they are free for (api.md §5, statuses), by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from simpletuner.events import EventType
from simpletuner.job import JobStatus
from simpletuner.jobs.fleet import CONNECT_S, FORGET_S, REST_S, Fleet
from simpletuner.jobs.worker_slot import WorkerTimers
from simpletuner.store.job_row import Move, NewJob
from simpletuner.store.store import Store

TIMERS = WorkerTimers(heartbeat_s=30, lease_s=120)
GPU = {"name": "A100", "count": 2, "vram_gb": 80, "driver": None, "accelerator": "cuda"}


class Yard:
    def __init__(self, state: Path) -> None:
        self.store = Store.open(state)
        self.now = 1000.0
        self.fleet = self.open()

    def open(self) -> Fleet:
        """As a server that starts does."""
        self.fleet = Fleet(self.store, TIMERS, clock=lambda: self.now)
        return self.fleet

    def add(self, name: str, *, kind: str = "persistent", connects: bool = True) -> str:
        worker_id = f"w_{name}"
        self.store.workers.create(worker_id, name, kind, {"zone": "server"}, f"hash of {name}")
        if connects:
            self.register(worker_id)
            self.fleet.asks(worker_id)
        return worker_id

    def register(self, worker_id: str) -> None:
        told = {"zone": "worker", "gpu": "a100"}
        self.store.workers.change(worker_id, gpu_info=GPU, told_labels=told, connected_at="2026-01-01T00:00:00.000Z")
        self.fleet.registered(worker_id)

    def status(self, worker_id: str) -> str:
        worker = self.store.workers.get(worker_id)
        assert worker is not None
        return self.fleet.status(worker)

    def give_job(self, worker_id: str) -> None:
        self.store.jobs.insert(NewJob(job_id="job", output_dir="/o", num_devices=2))
        move = Move(
            job_id="job", from_=JobStatus.QUEUED, to=JobStatus.STARTING, attempt=1, devices=(0, 1), worker_id=worker_id
        )
        assert self.store.jobs.move(move)

    def end_job(self) -> None:
        move = Move(job_id="job", from_=JobStatus.STARTING, to=JobStatus.COMPLETED, attempt=1)
        assert self.store.jobs.move(move)

    def said(self) -> list[tuple[str | None, str]]:
        events = (item.event for _, item in self.store.outbox.waiting())
        return [
            (event["data"].get("from"), event["data"]["to"])
            for event in events
            if event["type"] == EventType.WORKER_STATUS
        ]


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    built = Yard(tmp_path)
    yield built
    built.store.close()


def test_from_connecting_to_offline(yard: Yard) -> None:
    worker = yard.add("a", connects=False)
    assert yard.status(worker) == "offline" and yard.fleet.slots() == []
    yard.register(worker)
    assert yard.status(worker) == "connecting"
    yard.fleet.asks(worker)
    assert yard.status(worker) == "idle"
    yard.give_job(worker)
    assert yard.status(worker) == "busy"
    yard.end_job()
    assert yard.status(worker) == "idle"
    yard.now += TIMERS.lease_s - 1
    yard.fleet.beat(worker)
    yard.now += TIMERS.lease_s - 1
    assert yard.status(worker) == "idle"
    yard.now += 1
    assert yard.status(worker) == "offline"
    yard.fleet.beat(worker)
    assert yard.status(worker) == "idle"
    yard.fleet.left(worker)
    assert yard.status(worker) == "offline"


def test_one_that_never_asks_for_work_is_dropped(yard: Yard) -> None:
    worker = yard.add("a", connects=False)
    yard.register(worker)
    for _ in range(int(CONNECT_S // 100)):
        yard.now += 100
        yard.fleet.beat(worker)
    assert yard.status(worker) == "offline"


def test_a_heartbeat_does_not_undo_a_drain(yard: Yard) -> None:
    worker = yard.add("a")
    yard.store.workers.change(worker, draining=True)
    yard.fleet.beat(worker)
    assert yard.status(worker) == "draining"
    assert [yard.fleet.tell_drain(worker) for _ in range(2)] == [True, False]
    yard.fleet.told_anew(worker)
    assert yard.fleet.tell_drain(worker)


def test_a_lost_lease_must_be_lived_down(yard: Yard) -> None:
    worker = yard.add("a")
    yard.fleet.quarantine(worker)
    for _ in range(3):
        yard.fleet.beat(worker)
        assert yard.status(worker) == "quarantined"
        yard.now += 30
    yard.now += TIMERS.lease_s
    yard.fleet.beat(worker)
    assert yard.status(worker) == "quarantined", "a silence as long as a lease begins it anew"
    yard.open()
    yard.fleet.asks(worker)
    assert yard.status(worker) == "quarantined", "also after a restart of the server"
    for _ in range(4):
        yard.now += 30
        yard.fleet.beat(worker)
    assert yard.status(worker) == "idle"
    yard.fleet.round()
    found = yard.store.workers.get(worker)
    assert found is not None and not found.quarantined


def test_registering_again_lives_nothing_down(yard: Yard) -> None:
    worker = yard.add("a")
    yard.fleet.quarantine(worker)
    yard.register(worker)
    assert yard.status(worker) == "connecting"
    yard.fleet.round()
    yard.fleet.asks(worker)
    assert yard.status(worker) == "quarantined"


def test_a_server_that_starts_gives_nothing_to_one_that_it_has_not_heard(yard: Yard) -> None:
    """It may be gone for weeks."""
    worker, gone = yard.add("a"), yard.add("b")
    yard.open()
    assert [slot.status for slot in yard.fleet.slots()] == ["connecting", "connecting"]
    yard.fleet.asks(worker)
    yard.now += TIMERS.lease_s - 1
    yard.fleet.beat(worker)
    assert [yard.status(worker), yard.status(gone)] == ["idle", "connecting"]
    yard.now += 1
    assert [yard.status(worker), yard.status(gone)] == ["idle", "offline"]


def test_one_that_did_not_answer_rests_and_is_last_then(yard: Yard) -> None:
    first, second = yard.add("a"), yard.add("b")
    yard.fleet.rest(first)
    assert yard.status(first) == "busy"
    yard.now += REST_S
    yard.fleet.beat(first)
    slots = sorted(yard.fleet.slots(), key=lambda slot: slot.idle_since)
    assert [(slot.worker_id, slot.status) for slot in slots] == [(second, "idle"), (first, "idle")]
    assert slots[0].labels == {"zone": "server", "gpu": "a100"} and slots[0].memory_bytes == 80 * 2**30


def test_each_change_is_one_event(yard: Yard) -> None:
    worker = yard.add("a")
    unheard = yard.add("b", connects=False)
    assert [yard.fleet.round() for _ in range(2)] == [True, False]
    yard.give_job(worker)
    yard.fleet.round()
    yard.now += TIMERS.lease_s
    yard.fleet.round()
    assert yard.said() == [(None, "idle"), ("idle", "busy"), ("busy", "offline")]
    assert yard.status(unheard) == "offline"


def test_an_ephemeral_worker_is_forgotten(yard: Yard) -> None:
    spot, box = yard.add("spot", kind="ephemeral"), yard.add("box")
    yard.now += TIMERS.lease_s
    yard.fleet.round()
    yard.now += FORGET_S - 1
    yard.fleet.round()
    assert yard.store.workers.get(spot) is not None
    yard.now += 1
    yard.fleet.round()
    assert yard.store.workers.get(spot) is None and yard.store.workers.get(box) is not None
