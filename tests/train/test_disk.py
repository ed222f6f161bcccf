"""`disk_low_*`: what is done before a save when little room is left. training.md §2.7."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_world import Ran, TinyWorld

from simpletuner.config.disk import parse_bytes
from simpletuner.config.training_options import CheckpointOptions
from simpletuner.errors import ExitCode
from simpletuner.events import Journal, read_journal
from simpletuner.job import CommandName
from simpletuner.train.disk import DiskWatch
from simpletuner.train.report import Reporter
from simpletuner.train.requests import EndMode

NEVER = "900000T"
SAVES: dict[str, Any] = {"max_train_steps": 3, "checkpoint_step_interval": 1}


@pytest.mark.parametrize(
    ("text", "size"),
    [("100G", 100 << 30), ("512 MB", 512 << 20), ("1.5TiB", 3 << 39), ("17", 17), ("2k", 2048), ("x", None),
     ("G", None), ("-1G", None), ("1P", None), ("1e3", None)],
)  # fmt: skip
def test_sizes(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"disk_low_threshold": "plenty"}, "bad_value"),
        ({"disk_low_threshold": "1G", "disk_low_action": "script"}, "incompatible_options"),
        ({"disk_low_threshold": "1G", "disk_low_action": "script", "disk_low_script": "rm '"}, "bad_script"),
    ],
)
def test_what_cannot_be_meant(shared: TinyWorld, options: dict[str, Any], code: str) -> None:
    assert [problem.code for problem in shared.resolve(**options).errors] == [code]


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"disk_low_action": "wait"}, "disk_low_action"),
        ({"disk_low_threshold": "1G", "disk_low_script": "true"}, "disk_low_script"),
    ],
)
def test_what_has_no_effect(shared: TinyWorld, options: dict[str, Any], option: str) -> None:
    told = [(problem.code, problem.option) for problem in shared.resolve(**options).warnings]
    assert ("option_no_effect", option) in told


def test_enough_room_is_no_news(shared: TinyWorld) -> None:
    ran = shared.run(output_dir="roomy", disk_low_threshold="1K", **SAVES)
    assert ran.code is ExitCode.DONE and len(ran.of_type("training.checkpoint")) == 3


def test_stop_ends_the_run_before_the_save(shared: TinyWorld) -> None:
    ran = shared.main(shared.job(output_dir="low", disk_low_threshold=NEVER, **SAVES))
    assert ran.code == 73 and ran.events[-1]["data"]["code"] == "disk_low"
    assert list(ran.output.glob("checkpoint-*")) == [] and ran.metrics()[-1]["step"] == 1


def test_a_script_makes_room_or_does_not(shared: TinyWorld) -> None:
    file = shared.root / "disk-asked"
    script = {"disk_low_threshold": NEVER, "disk_low_action": "script", "disk_low_script": f"touch {file}"}
    ran = shared.main(shared.job(output_dir="scripted", **SAVES, **script))
    assert ran.code == 73 and file.exists()
    assert [event["data"]["script"] for event in ran.of_type("training.hook")] == ["disk_low_script"]


@pytest.mark.parametrize(("command", "saved"), [(CommandName.STOP, True), (CommandName.CANCEL, False)])
def test_a_waiting_run_listens(shared: TinyWorld, command: CommandName, saved: bool) -> None:
    """Asked before the first save: a stop saves with what room there is, a cancel does not."""
    wait = {"disk_low_threshold": NEVER, "disk_low_action": "wait", "max_train_steps": 9, "checkpoint_step_interval": 2}
    ran: Ran = shared.run_until(2, command, output_dir=f"waiting-{command}", **wait)
    assert ran.code is ExitCode.STOPPED
    assert bool(list(ran.output.glob("checkpoint-*"))) is saved
    assert len(ran.notices("disk_low")) == saved


class Disk:
    """Free space that grows with the time that is slept."""

    def __init__(self, folder: Path, room_after_s: float, action: str, end: EndMode | None = None) -> None:
        self.slept_s = 0.0
        self.looks = 0
        journal = Journal(folder / "events.jsonl", job_id="j")
        options = CheckpointOptions(disk_low_threshold="1K", disk_low_action=action)
        reporter = Reporter(journal, folder)
        self.journal = folder / "events.jsonl"
        self.room_after_s = room_after_s
        self.end = end
        self.watch = DiskWatch(
            options, folder, reporter, self.asked, None, free_bytes=self.free, sleep=self.sleep
        )  # fmt: skip

    def asked(self) -> EndMode | None:
        return self.end if self.slept_s >= 40 else None

    def free(self, _folder: Path) -> int:
        self.looks += 1
        return 2000 if self.slept_s >= self.room_after_s else 10

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds

    def codes(self) -> list[str]:
        return [json.loads(line)["data"]["code"] for _, line in read_journal(self.journal)]


def test_waiting_looks_every_thirty_seconds(tmp_path: Path) -> None:
    disk = Disk(tmp_path, 65.0, "wait")
    assert disk.watch.find_room(4, None)
    assert disk.slept_s == 90 and disk.codes() == ["disk_low", "disk_has_room"]
    assert disk.looks <= 6


@pytest.mark.parametrize(("end", "saves"), [("stop", True), ("yield", True), ("cancel", False)])
def test_waiting_ends_between_two_looks(tmp_path: Path, end: EndMode, saves: bool) -> None:
    disk = Disk(tmp_path, 1e9, "wait", end)
    assert disk.watch.find_room(4, None) is saves
    assert disk.slept_s == 40 and disk.codes() == ["disk_low"]
