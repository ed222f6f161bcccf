"""Parts of the runner that need no process."""

from __future__ import annotations

import errno
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.events import Event, EventType, Journal, NoticeData, TrainingStatusData, read_journal
from simpletuner.job import JobSpec
from simpletuner.jobs.output import BATCH_LINES, OutputPump
from simpletuner.jobs.runner import read_verdict, trainer_command


def spec(num_processes: int) -> JobSpec:
    return JobSpec(job_id="j", workspace="/w", config_dir="/c", output_dir="/o", num_processes=num_processes)


def test_one_process_is_python_and_several_are_torchrun() -> None:
    assert trainer_command(spec(1), Path("/j"), None)[1:] == ["-m", "simpletuner.train", "/j"]
    several = trainer_command(spec(2), Path("/j"), None)
    assert several[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    assert several[5:] == ["2", "-m", "simpletuner.train", "/j"]
    assert trainer_command(spec(2), Path("/j"), "fake.py")[1:] == ["fake.py", "/j"]


def logged(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["data"] for _, line in read_journal(journal)]


def test_output_is_kept_whole_and_sent_in_batches(tmp_path: Path) -> None:
    pump = OutputPump(tmp_path / "log.txt", Journal(tmp_path / "events.jsonl", job_id="j"))
    text = b"".join(b"line %d\n" % number for number in range(1, 2 * BATCH_LINES + 6))
    pump.feed("stdout", text[:1000])
    pump.feed("stdout", text[1000:])
    pump.feed("stderr", b" 10%\r 20%\r100%\r\n\xff half")
    pump.finish()
    events = logged(tmp_path / "events.jsonl")
    assert all(len(event["lines"]) <= BATCH_LINES for event in events)
    lines = [line for event in events if event["stream"] == "stdout" for line in event["lines"]]
    assert lines == text.decode().splitlines()
    numbers = [(event["first_line"], len(event["lines"])) for event in events if event["stream"] == "stdout"]
    assert all(first + count == later for (first, count), (later, _) in itertools.pairwise(numbers))
    assert [event["lines"] for event in events if event["stream"] == "stderr"] == [["100%", "\ufffd half"]]
    assert (tmp_path / "log.txt").read_bytes() == text + b" 10%\r 20%\r100%\r\n\xff half"
    assert len(pump.tail) == 50


def test_the_first_line_goes_at_once_and_the_next_wait(tmp_path: Path) -> None:
    journal = tmp_path / "events.jsonl"
    pump = OutputPump(tmp_path / "log.txt", Journal(journal, job_id="j"))
    pump.feed("stdout", b"a\n")
    pump.flush_due(10.0)
    pump.feed("stdout", b"b\n")
    pump.flush_due(10.9)
    assert [event["lines"] for event in logged(journal)] == [["a"]]
    pump.flush_due(11.0)
    assert [event["lines"] for event in logged(journal)] == [["a"], ["b"]]


def test_a_full_disk_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "events.jsonl", job_id="j")
    pump = OutputPump(tmp_path / "log.txt", journal)

    def refuse(_event: Event) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(journal, "append", refuse)
    pump.feed("stdout", b"a\n" * BATCH_LINES)
    assert pump.write_error is not None
    assert len(pump.tail) == 50


def test_the_verdict_is_the_last_error_of_this_attempt(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for attempt in (1, 2):
        journal = Journal(path, job_id="j", attempt=attempt)
        for code in ("first", f"of_{attempt}"):
            data = NoticeData(code=code, hint=f"hint {code}")
            journal.append(Event(type=EventType.ERROR, message=f"message {code}", data=data))
        ended = TrainingStatusData(status="failed", global_step=1, total_num_steps=2, exit_code=60 + attempt)
        journal.append(Event(type=EventType.TRAINING_STATUS, data=ended))
    verdict = read_verdict(path, 0, attempt=2)
    assert (verdict.error_code, verdict.message, verdict.exit_code) == ("of_2", "message of_2", 62)
    assert read_verdict(path, path.stat().st_size, attempt=2).error_code is None
