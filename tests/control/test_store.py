"""Exactly once, whatever dies in between; and only the transitions of the contract."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, text

from simpletuner.events import Event, EventType, Journal, LogData
from simpletuner.job import TRANSITIONS, JobStatus
from simpletuner.store.database import Database, newest_revision
from simpletuner.store.event_filter import EventFilter
from simpletuner.store.events import EventStore
from simpletuner.store.job_row import JobQuery, Move, NewJob
from simpletuner.store.schema import events_metadata, state_metadata
from simpletuner.store.store import Store

GOLDEN = Path(__file__).with_name("schema.golden.sql")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path)
    yield opened
    opened.close()


def log_event(number: int) -> Event:
    data = LogData(stream="stdout", first_line=number, lines=[f"line {number} ü"])
    return Event(type=EventType.LOG, data=data)


@pytest.mark.parametrize("branch", ["state", "events"])
def test_migrations_build_what_the_tables_say(tmp_path: Path, branch: str) -> None:
    database = Database.open(f"sqlite:///{tmp_path / 'x.db'}", branch)
    metadata = state_metadata if branch == "state" else events_metadata
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        stored = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        assert stored == newest_revision(branch)
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1
    database.close()


def test_schema_golden(store: Store, tmp_path: Path) -> None:
    shown = "".join(_schema(tmp_path / name) for name in ("simpletuner.db", "events.db"))
    assert shown == GOLDEN.read_text(), "a changed schema needs a migration and a new golden file"


def _schema(path: Path) -> str:
    with sqlite3.connect(path) as connection:
        rows = connection.execute("select sql from sqlite_master where sql is not null order by name").fetchall()
    return f"-- {path.name}\n" + "".join(f"{' '.join(row[0].split())}\n" for row in rows)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 5), max_size=6), data=st.data())
def test_a_journal_is_stored_once_across_deaths(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("store")
    path = folder / "events.jsonl"
    number = 0
    for cut in cuts:
        journal = Journal(path, job_id="job")
        for _ in range(cut):
            number += 1
            journal.append(log_event(number))
        journal.close()
        if data.draw(st.booleans()):
            with path.open("ab") as torn:
                torn.write(log_event(0).as_line()[: data.draw(st.integers(1, 60))])
        # Each round is a server that dies: nothing is closed in order.
        store = Store.open(folder)
        store.events.tail("job", path)
    store = Store.open(folder)
    store.events.tail("job", path)
    rows = store.events.of_type("job", EventType.LOG)
    assert [row.as_dict()["data"]["first_line"] for row in rows] == list(range(1, number + 1))
    assert [row.id for row in rows] == [f"job:{seq}" for seq in range(1, number + 1)]
    assert [row.index for row in rows] == list(range(1, number + 1))


def test_rows_and_position_fall_together(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path, job_id="job")
    journal.append(log_event(1))
    monkeypatch.setattr("simpletuner.store.events.update", lambda _table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.events.tail("job", path)
    monkeypatch.undo()
    assert store.events.newest_index() == 0
    assert [row.index for row in store.events.tail("job", path)] == [1]
    assert store.events.tail("job", path) == []


def test_the_outbox_is_relayed_once(store: Store) -> None:
    store.jobs.insert(NewJob(job_id="job", output_dir="/x"))
    waiting = store.outbox.waiting()
    first = store.events.relay(event for _, event in waiting)
    # Dies before it forgets them.
    assert store.events.relay(event for _, event in store.outbox.waiting()) == []
    store.outbox.forget(waiting[-1][0])
    assert store.outbox.waiting() == []
    assert [event.as_dict()["data"]["to"] for event in first] == ["queued"]


@pytest.mark.parametrize("from_", list(JobStatus))
def test_no_other_transition_is_possible(store: Store, from_: JobStatus) -> None:
    for to in JobStatus:
        store.jobs.insert(NewJob(job_id=to, output_dir="/x"))
        with store.database.write() as connection:
            connection.execute(text("update jobs set status = :from where job_id = :to"), {"from": from_, "to": to})
        move = Move(job_id=to, from_=from_, to=to, attempt=1)
        before = len(store.outbox.waiting())
        if to in TRANSITIONS[from_]:
            assert store.jobs.move(move)
            assert not store.jobs.move(move), "a second one is stale"
            assert len(store.outbox.waiting()) == before + 1
        else:
            with pytest.raises(ValueError, match="no transition"):
                store.jobs.move(move)
            assert len(store.outbox.waiting()) == before
            row = store.jobs.get(to)
            assert row is not None
            assert row.status is from_


def test_a_stale_attempt_changes_nothing(store: Store) -> None:
    store.jobs.insert(NewJob(job_id="job", output_dir="/x"))
    assert not store.jobs.move(Move(job_id="job", from_=JobStatus.QUEUED, to=JobStatus.STARTING, attempt=7))


def test_a_device_is_leased_once(store: Store) -> None:
    for name in ("a", "b"):
        store.jobs.insert(NewJob(job_id=name, output_dir=f"/{name}"))
    start = [
        Move(job_id=name, from_=JobStatus.QUEUED, to=JobStatus.STARTING, attempt=1, devices=devices)
        for name, devices in (("a", (0, 1)), ("b", (1, 2)))
    ]
    assert store.jobs.move(start[0])
    assert not store.jobs.move(start[1])
    assert store.jobs.leases() == {0: "a", 1: "a"}
    refused = store.jobs.get("b")
    assert refused is not None
    assert refused.status is JobStatus.QUEUED
    lost = Move(job_id="a", from_=JobStatus.STARTING, to=JobStatus.LOST, attempt=1)
    assert store.jobs.move(lost)
    assert store.jobs.move(start[1])


def test_pages_chain_without_loss_across_filters(store: Store, tmp_path: Path) -> None:
    for name in ("a", "b"):
        journal = Journal(tmp_path / name, job_id=name)
        for number in range(1, 8):
            journal.append(log_event(number))
            journal.append(Event(type=EventType.TRAINING_PROGRESS))
        store.events.tail(name, tmp_path / name)
    wanted = EventFilter.parse(job_id="b", types=["training.*, nothing"])
    since, found, more = 0, [], True
    while more:
        page = store.events.page(since, wanted, limit=3)
        found += [event.id for event in page.events]
        since, more = page.next_index, page.has_more
    assert found == [f"b:{seq}" for seq in range(2, 15, 2)]
    assert since == 29
    assert store.events.page(100, wanted, limit=1).next_index == 100
    assert all(wanted.accepts(job_id="b", type_=kind) for kind in ("training.progress", "nothing"))
    assert not wanted.accepts(job_id="a", type_="training.progress")


@pytest.mark.parametrize("wanted", [EventFilter(), EventFilter(job_id="a")], ids=["every job", "one job"])
def test_a_page_never_reads_the_whole_log(store: Store, tmp_path: Path, wanted: EventFilter) -> None:
    """SQLite walks the table to answer a least and a greatest number that are asked for at once."""
    journal = Journal(tmp_path / "a", job_id="a")
    journal.append(log_event(1))
    store.events.tail("a", tmp_path / "a")
    database = Database(f"sqlite:///{tmp_path / 'events.db'}")
    asked: list[tuple[str, Any]] = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def _(_connection: object, _cursor: object, statement: str, parameters: Any, *_rest: object) -> None:
        asked.append((statement, parameters))

    assert EventStore(database).page(1, wanted, limit=10).events
    plans: list[str] = []
    with database.read() as connection:
        for statement, parameters in [one for one in asked if one[0].startswith("SELECT")]:
            plans += [row.detail for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    database.close()
    assert len(plans) == 3 and all(plan.startswith("SEARCH") for plan in plans), plans


def test_jobs_are_found_by_what_they_are(store: Store) -> None:
    for number in range(5):
        store.jobs.insert(NewJob(job_id=f"j{number}", output_dir="/x", config_name="even" if number % 2 == 0 else None))
    page = store.jobs.find(JobQuery(config_name="even", limit=2))
    assert (page.total, [job.job_id for job in page.jobs]) == (3, ["j4", "j2"])
    assert not store.jobs.delete("j0")
