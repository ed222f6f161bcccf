"""Escalation, outcome, inventory, settings, negotiation: no process, no clock."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from simpletuner.errors import UserError
from simpletuner.job import ACTIVE, TRANSITIONS, CommandName, ExitRecord, JobStatus
from simpletuner.jobs.devices import Device, read_inventory
from simpletuner.jobs.escalation import Escalation
from simpletuner.jobs.outcome import judge
from simpletuner.server.negotiation import wants_html_by_default, wants_html_strictly
from simpletuner.server.settings import ServerSettings


def test_cancel_escalates_by_the_clock() -> None:
    cancel = Escalation(stop_grace_s=600)
    cancel.request(CommandName.CANCEL, 100.0)
    assert cancel.next_signal(101.9) is None
    assert cancel.next_signal(102.0) is signal.SIGTERM
    assert cancel.next_signal(106.9) is None
    assert cancel.next_signal(107.0) is signal.SIGKILL
    assert cancel.next_signal(200.0) is None
    assert cancel.forced


def test_a_stronger_request_wins_and_a_weaker_one_does_not() -> None:
    asked = Escalation(stop_grace_s=10)
    asked.request(CommandName.YIELD, 0.0)
    asked.request(CommandName.STOP, 5.0)
    assert (asked.mode, asked.next_signal(9.9)) == ("stop", None)
    asked.request(CommandName.CANCEL, 6.0)
    asked.request(CommandName.STOP, 7.0)
    asked.request(CommandName.VALIDATE, 7.0)
    assert asked.mode == "cancel"
    assert asked.next_signal(8.0) is signal.SIGTERM


records = st.none() | st.builds(
    ExitRecord,
    code=st.sampled_from([None, 0, 1, 64, 70, 71, 75]),
    signal=st.sampled_from([None, 9, 15]),
    mode=st.sampled_from([None, "stop", "cancel", "yield"]),
    forced=st.booleans(),
    error_code=st.sampled_from([None, "rank_lost", "host_out_of_memory"]),
)


@given(st.sampled_from(sorted(ACTIVE)), st.sampled_from([None, "stop", "cancel", "yield"]), records, st.integers(1, 3))
def test_every_outcome_is_a_listed_transition(
    status: JobStatus, mode: str | None, record: ExitRecord | None, attempt: int
) -> None:
    mode = mode or "stop" if status is JobStatus.STOPPING else None
    outcome = judge(status=status, mode=mode, record=record, attempt=attempt, max_attempts=3)
    assert outcome.to in TRANSITIONS[status]
    assert outcome.reason
    if outcome.next_attempt is not None:
        assert outcome.to is JobStatus.QUEUED
        assert outcome.next_attempt == attempt + 1 <= 3
    if record is not None and record.code == 0:
        assert outcome.to is JobStatus.COMPLETED


def outcome_of(status: JobStatus, mode: str | None, record: ExitRecord | None, max_attempts: int = 1) -> JobStatus:
    return judge(status=status, mode=mode, record=record, attempt=1, max_attempts=max_attempts).to


def test_outcomes_of_the_contract() -> None:
    running, stopping = JobStatus.RUNNING, JobStatus.STOPPING
    killed = ExitRecord(code=None, signal=9)
    assert outcome_of(running, None, ExitRecord(code=75)) is JobStatus.STOPPED
    assert outcome_of(running, None, killed) is JobStatus.FAILED
    assert outcome_of(running, None, killed, 2) is JobStatus.QUEUED
    assert outcome_of(running, None, None) is JobStatus.LOST
    assert outcome_of(running, None, ExitRecord(code=64), 2) is JobStatus.FAILED
    memory = killed.model_copy(update={"error_code": "host_out_of_memory"})
    assert outcome_of(running, None, memory, 2) is JobStatus.FAILED
    assert outcome_of(stopping, "stop", killed.model_copy(update={"forced": True})) is JobStatus.STOPPED
    assert outcome_of(stopping, "stop", ExitRecord(code=70)) is JobStatus.FAILED
    assert outcome_of(stopping, "cancel", ExitRecord(code=70)) is JobStatus.CANCELLED
    assert outcome_of(stopping, "cancel", None) is JobStatus.CANCELLED
    assert outcome_of(stopping, "cancel", ExitRecord(code=0)) is JobStatus.COMPLETED
    assert outcome_of(stopping, "yield", ExitRecord(code=75)) is JobStatus.QUEUED


def test_inventory_is_read_from_its_setting() -> None:
    gpus = [Device(0, "A", 80, "cuda", "0"), Device(1, "B", 24, "cuda", "1")]
    assert read_inventory("auto", {}, probe=list) == [Device(0, "cpu")]
    assert read_inventory("auto", {}, probe=lambda: gpus) == gpus
    masked = read_inventory("auto", {"CUDA_VISIBLE_DEVICES": "1"}, probe=lambda: gpus)
    assert masked == [Device(0, "B", 24, "cuda", "1")]
    assert len(read_inventory("cpu:2", {})) == 2
    named = read_inventory('[{"name": "A100", "memory_gb": 80, "kind": "cuda"}]', {})
    assert named == [Device(0, "A100", 80.0, "cuda", "0")]
    for wrong in ("cpu:0", "gpus", "[]", "[1]", '[{"memory_gb": 1}]', "["):
        with pytest.raises(UserError, match="SIMPLETUNER_DEVICES"):
            read_inventory(wrong, {})


def test_flags_beat_variables_beat_defaults(tmp_path: Path) -> None:
    environ = {"SIMPLETUNER_PORT": "9001", "SIMPLETUNER_HOST": "::1", "DATASETS_DIR": "data"}
    settings = ServerSettings.read({"port": 9002}, environ, tmp_path)
    assert (settings.port, settings.host, settings.url) == (9002, "::1", "http://[::1]:9002")
    assert settings.datasets_dir == tmp_path / "data"
    assert settings.state_dir == tmp_path / ".simpletuner"
    with pytest.raises(UserError, match="whole number"):
        ServerSettings.read({}, {"SIMPLETUNER_PORT": "high"}, tmp_path)


@pytest.mark.parametrize(
    ("accept", "validate_html", "start_html"),
    [
        (None, True, False),
        ("*/*", True, False),
        ("text/html", True, True),
        ("application/json", False, False),
        ("application/json, text/html;q=0.5", False, False),
        ("application/json;q=0.5, text/html", True, True),
        ("text/html,application/xhtml+xml,*/*;q=0.8", True, True),
    ],
)
def test_negotiation(accept: str | None, validate_html: bool, start_html: bool) -> None:
    headers = Headers({} if accept is None else {"accept": accept})
    assert wants_html_by_default(headers) is validate_html
    assert wants_html_strictly(headers) is start_html
