"""Programs that a run starts. training.md §7.3; acceptance 48, 50."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_world import Ran, TinyWorld

from simpletuner.checkpoints import MANIFEST
from simpletuner.errors import ExitCode
from simpletuner.events import HookData, Journal, read_journal
from simpletuner.job import Command, CommandName
from simpletuner.train.hooks import AFTER_CHECKPOINT, Hooks
from simpletuner.train.report import Reporter

HOSTILE = """"; touch x; $HOME '"""
EXTERNAL: dict[str, Any] = {
    "validation_method": "external-script",
    "validation_disable": False,
    "validation_step_interval": 2,
    "validation_prompt": "red",
}
ASLEEP = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1] + ".part").write_text(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""
"""Says who it and its child are, and stays."""


def command(folder: Path, code: str, *words: object) -> str:
    """A template that runs `code`; the words are the template's own."""
    folder.mkdir(exist_ok=True)
    file = folder / f"script{len(list(folder.iterdir()))}.py"
    file.write_text(code)
    return " ".join([sys.executable, str(file), *map(str, words)])


def recording(folder: Path, *words: object) -> tuple[str, Path]:
    """Each start appends its arguments, as JSON, to a file."""
    file = folder / "calls.jsonl"
    code = f"import json, sys\nopen({str(file)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    return command(folder, code, *words), file


def calls(file: Path) -> list[list[str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def hooks_of(ran: Ran) -> list[dict[str, Any]]:
    return [event["data"] for event in ran.of_type("training.hook")]


def is_gone(pids: str) -> bool:
    """Whether none of the processes runs; they may take a moment to die."""
    for _ in range(200):
        left = [int(pid) for pid in pids.split() if psutil.pid_exists(int(pid))]
        if all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in left if psutil.pid_exists(pid)):
            return True
        time.sleep(0.05)
    return False


def test_a_value_is_one_argument_whatever_it_holds(shared: TinyWorld, tmp_path: Path) -> None:
    """Acceptance 48; and every kind of value."""
    names = (
        "validation_prompt", "global_step", "local_checkpoint_path", "remote_checkpoint_path", "model_family",
        "model_type", "validation_seed", "validation_guidance", "validation_disable", "validation_resolution",
        "validation_step_interval", "tracker_run_name", "huggingface_path",
    )  # fmt: skip
    script, file = recording(tmp_path, "'two words'", "--in={validation_prompt}!", *(f"{{{name}}}" for name in names))
    options = {"validation_prompt": HOSTILE, "validation_resolution": [64, 128], "validation_guidance": 0}
    ran = shared.run(
        output_dir="hostile", checkpoint_step_interval=2, validation_external_script=script, **EXTERNAL | options
    )
    assert ran.code is ExitCode.DONE
    first, last = calls(file)
    assert first == [
        "two words", f"--in={HOSTILE}!", HOSTILE, "2", str(ran.output / "checkpoint-2"), "", "pixart_sigma", "full",
        "", "0", "false", "[64, 128]", "2", "simpletuner-testing", "",
    ]  # fmt: skip
    assert (last[3], last[4]) == ("4", str(ran.output / "checkpoint-4")), "in place of the last pass too"
    assert hooks_of(ran)[0]["argv"][2:] == first and not (shared.root / "x").exists()


def test_nothing_is_drawn_here(shared: TinyWorld, tmp_path: Path) -> None:
    script, file = recording(tmp_path, "{global_step}")
    ran = shared.run(
        CommandName.VALIDATE, output_dir="elsewhere", max_train_steps=3, validation_external_script=script, **EXTERNAL
    )
    assert calls(file) == [["1"], ["2"], ["3"]]
    assert ran.of_type("validation.image") == []
    assert not (ran.output / "validation_images").exists() and not (ran.output / "benchmarks").exists()
    told = [(e["data"]["status"], e["data"]["cause"], e.get("request_id")) for e in ran.of_type("training.validation")]
    assert told == [
        (status, *why)
        for why in (("request", "validate"), ("interval", None), ("end", None))
        for status in ("started", "completed")
    ]


def test_without_a_checkpoint_a_pass_that_needs_one_is_skipped(shared: TinyWorld, tmp_path: Path) -> None:
    script, file = recording(tmp_path, "{local_checkpoint_path}")
    ran = shared.run(output_dir="too-early", validation_external_script=script, **EXTERNAL)
    assert [event["data"]["status"] for event in ran.of_type("training.validation")] == [
        "skipped", "started", "completed",
    ]  # fmt: skip
    assert [event["severity"] for event in ran.notices("no_checkpoint_yet")] == ["warning"]
    assert calls(file) == [[str(ran.output / "checkpoint-4")]]


def test_after_a_resume_the_resumed_checkpoint_is_the_newest(shared: TinyWorld, tmp_path: Path) -> None:
    script, file = recording(tmp_path, "{global_step}", "{local_checkpoint_path}")
    options = EXTERNAL | {"validation_step_interval": 1, "validation_on_startup": True}
    shared.run(output_dir="resumed-hooks", max_train_steps=2)
    ran = shared.run(output_dir="resumed-hooks", max_train_steps=4, validation_external_script=script, **options)
    assert [[step, Path(path).name] for step, path in calls(file)] == [
        ["2", "checkpoint-2"], ["3", "checkpoint-2"], ["4", "checkpoint-4"],
    ]  # fmt: skip
    afresh = options | {"resume_from_checkpoint": "", "max_train_steps": 1}
    shared.run(output_dir="resumed-hooks", validation_external_script=script, **afresh)
    assert calls(file)[3:] == [["1", str(ran.output / "checkpoint-1")]], "none of an earlier run's"


def test_beside_training_nobody_waits_and_all_are_reaped(shared: TinyWorld, tmp_path: Path) -> None:
    """Acceptance 50. The program ends only after steps that come after its start."""
    before = psutil.Process().children()  # a server of other tests, maybe
    code = (
        "import json, pathlib, sys, time\n"
        "while '\"step\": 4' not in pathlib.Path(sys.argv[1]).read_text(): time.sleep(0.02)\n"
    )
    metrics = shared.root / "beside/training_metrics.jsonl"
    script = command(tmp_path, code, metrics)
    options = EXTERNAL | {"validation_external_background": True}
    ran = shared.run(output_dir="beside", validation_external_script=script, **options)
    assert ran.code is ExitCode.DONE
    assert [data["status"] for data in hooks_of(ran)] == ["completed"] * 2
    order = [event["type"] + ":" + str(event["data"].get("status")) for event in ran.events]
    assert order.index("training.validation:completed") > order.index("training.validation:started")
    assert order.index("training.hook:completed") < order.index("training.status:completed")
    assert psutil.Process().children() == before


def test_a_program_that_fails_is_a_warning(shared: TinyWorld, tmp_path: Path) -> None:
    script = command(tmp_path, "import sys\nprint('a' * 5000 + 'é')\nsys.exit(3)")
    ran = shared.run(output_dir="failing", validation_external_script=script, **EXTERNAL)
    assert ran.code is ExitCode.DONE
    events = ran.of_type("training.hook")
    assert [(e["severity"], e["data"]["status"], e["data"]["exit_code"]) for e in events] == [
        ("warning", "failed", 3)
    ] * 2
    assert events[0]["data"]["output_tail"] == "a" * 3998 + "é\n"
    failed = [event["data"] for event in ran.of_type("training.validation") if event["data"]["status"] == "failed"]
    assert len(failed) == 2 and "exit code 3" in failed[0]["reason"]


def test_each_complete_checkpoint_is_told_once(shared: TinyWorld, tmp_path: Path) -> None:
    """After the rename; and it is not removed while a program looks at it."""
    code = (
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        f"assert (folder / {MANIFEST!r}).exists()\n"
        f"while not (folder.parent / 'checkpoint-4' / {MANIFEST!r}).exists(): time.sleep(0.02)\n"
        f"time.sleep(0.2)\nprint(sys.argv[2], (folder / {MANIFEST!r}).exists())\n"
    )
    script = command(tmp_path, code, "{local_checkpoint_path}", "{global_step}")
    ran = shared.run(
        output_dir="told", checkpoint_step_interval=2, checkpoints_total_limit=1, post_checkpoint_script=script
    )
    said = [(data["argv"][2:], data["output_tail"], data["status"]) for data in hooks_of(ran)]
    assert sorted(said) == [
        ([str(ran.output / f"checkpoint-{step}"), str(step)], f"{step} True\n", "completed") for step in (2, 4)
    ]
    types = [event["type"] for event in ran.events]
    assert types.index("training.checkpoint") < types.index("training.hook")
    assert all(data["script"] == "post_checkpoint_script" for data in hooks_of(ran))


def test_a_cancel_leaves_no_process(shared: TinyWorld, tmp_path: Path) -> None:
    before = psutil.Process().children()  # a server of other tests, maybe
    place = tmp_path / "pids"
    script = command(tmp_path, ASLEEP, place)
    ran = shared.run_until(2, CommandName.CANCEL, output_dir="asleep", validation_external_script=script, **EXTERNAL)
    assert ran.code is ExitCode.STOPPED and not place.exists(), "nothing is started after a cancel"
    options = {"checkpoint_step_interval": 1, "post_checkpoint_script": script}
    job = shared.job(output_dir="asleep2", **options)

    def cancel(count: int, loss: Any) -> Any:
        while count == 2 and not place.exists():
            time.sleep(0.02)
        if count == 2:
            job.send(Command(command=CommandName.CANCEL, request_id="c"))
        return loss

    ran = shared.main(job, cancel)
    assert ran.code is ExitCode.STOPPED
    assert [(data["status"], data.get("exit_code")) for data in hooks_of(ran)] == [("cancelled", None)]
    assert is_gone(place.read_text()) and psutil.Process().children() == before


def test_a_trainer_that_is_killed_takes_its_programs_along(shared: TinyWorld, tmp_path: Path) -> None:
    place = tmp_path / "pids"
    before = (
        "import os, pathlib, signal, time, torch\n"
        "plain, left = torch.Tensor.backward, [2]\n"
        "def backward(*args, **keys):\n"
        "    left[0] -= type(args[0]).__name__ != 'FakeTensor'\n"
        f"    while left[0] == 0 and not pathlib.Path({str(place)!r}).exists(): time.sleep(0.02)\n"
        "    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    plain(*args, **keys)\n"
        "torch.Tensor.backward = backward\n"
    )
    script = command(tmp_path, ASLEEP, place)
    job = shared.job(output_dir="orphans", checkpoint_step_interval=1, post_checkpoint_script=script)
    assert shared.spawn(job, before=before).code == -9
    assert is_gone(place.read_text())


# --- the runner of programs itself


class Bench:
    """Hooks of a configuration with one command, and what they told."""

    def __init__(self, world: TinyWorld, folder: Path, template: str, end: Any = None, **keys: Any) -> None:
        self.journal = folder / "journal.jsonl"
        reporter = Reporter(Journal(self.journal, job_id="bench"), folder)
        config = world.resolve(post_checkpoint_script=template).require()
        self.hooks = Hooks(config, reporter, lambda: end, **keys)

    def run(self) -> HookData:
        future = self.hooks.start(AFTER_CHECKPOINT, 7, None)
        assert future is not None
        return self.hooks.wait_for(future)


@pytest.mark.parametrize(
    ("end", "keys", "status"),
    [(None, {"limit_s": 1.5}, "timed_out"), ("stop", {"stop_grace_s": 1.5}, "cancelled"), ("cancel", {}, "cancelled")],
)
def test_an_end_reaches_the_whole_group(
    shared: TinyWorld, tmp_path: Path, end: str | None, keys: dict[str, Any], status: str
) -> None:
    place = tmp_path / "pids"
    bench = Bench(shared, tmp_path, command(tmp_path / "s", ASLEEP, place), end, **keys)
    data = bench.run()
    assert (data.status, data.exit_code) == (status, None) and data.seconds < 10
    if end != "cancel":
        assert is_gone(place.read_text())
    bench.hooks.close()
    (line,) = [json.loads(line) for _, line in read_journal(bench.journal)]
    assert (line["type"], line["severity"], line["data"]["status"]) == ("training.hook", "warning", status)


def test_what_a_program_leaves_behind_ends_with_it(shared: TinyWorld, tmp_path: Path) -> None:
    place = tmp_path / "pids"
    leave = ASLEEP.rpartition("time.sleep(600)")[0]
    assert Bench(shared, tmp_path, command(tmp_path / "s", leave, place)).run().status == "completed"
    assert is_gone(place.read_text())


def test_two_at_once(shared: TinyWorld, tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys, time\nplace = pathlib.Path(sys.argv[1])\n"
        "(place / f'started{os.getpid()}').touch()\n"
        "while not (place / 'go').exists(): time.sleep(0.02)\n"
    )
    bench = Bench(shared, tmp_path, command(tmp_path / "s", code, tmp_path))
    futures = [bench.hooks.start(AFTER_CHECKPOINT, step, None) for step in range(3)]
    while len(list(tmp_path.glob("started*"))) < 2:
        time.sleep(0.02)
    assert sum(future is not None and future.running() for future in futures) == 2
    (tmp_path / "go").touch()
    bench.hooks.finish()
    assert len(list(tmp_path.glob("started*"))) == 3
    assert all(future is not None and future.result().status == "completed" for future in futures)


def test_a_secret_of_the_environment_is_in_no_event(
    shared: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_A_TEST", "two words")
    script, file = recording(tmp_path / "s", "{env:SECRET_OF_A_TEST}", "{global_step}")
    bench = Bench(shared, tmp_path, script)
    assert bench.run().argv[2:] == ["{env:SECRET_OF_A_TEST}", "7"]
    assert calls(file) == [["two words", "7"]]
    monkeypatch.delenv("SECRET_OF_A_TEST")
    data = bench.run()
    assert (data.status, data.exit_code) == ("failed", None) and "SECRET_OF_A_TEST" in data.output_tail
    assert b"two words" not in bench.journal.read_bytes()


def test_a_program_that_cannot_start(shared: TinyWorld, tmp_path: Path) -> None:
    data = Bench(shared, tmp_path, "/nowhere/program x").run()
    assert (data.status, data.exit_code) == ("failed", 127)
    assert data.output_tail == "/nowhere/program: No such file or directory\n"
    with_nul = Bench(shared, tmp_path, f"{sys.executable} 'a\0b'").run()
    assert with_nul.status == "failed" and "null byte" in with_nul.output_tail


def test_a_module_of_the_workspace_does_not_stand_for_pythons_own(
    shared: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "subprocess.py").write_text("raise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(Path(place).absolute()) for place in sys.path if place))
    bench = Bench(shared, tmp_path, command(tmp_path / "s", "import os\nprint(os.getcwd(), end='')"))
    monkeypatch.chdir(tmp_path)
    data = bench.run()
    assert (data.status, data.output_tail) == ("completed", str(tmp_path))
