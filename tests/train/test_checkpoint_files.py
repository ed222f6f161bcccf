"""Checkpoint folders as files: whole or nothing. training.md §6.1, 6.2; acceptance 39–43."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.checkpoints import (
    MANIFEST,
    STATE,
    complete_checkpoint,
    find_faults,
    list_checkpoints,
    prune_checkpoints,
    remove_temporary,
    temporary_folder,
)

FILES = {"transformer/config.json": b"{}", "transformer/weights.safetensors": b"w" * 500, STATE: b'{"step": 1}'}


def save(output: Path, step: int, content: bytes = b"x" * 300) -> Path:
    folder = temporary_folder(output, step)
    for name, data in {**FILES, "optimizer-rank0.safetensors": content}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return complete_checkpoint(folder, output, step).path


def latest_whole(output: Path) -> str | None:
    return next((folder.name for folder in list_checkpoints(output) if not find_faults(folder.path)), None)


def test_a_whole_one(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    assert path.name == "checkpoint-5" and find_faults(path) == []
    manifest = json.loads((path / MANIFEST).read_text())
    assert set(manifest["files"]) == {*FILES, "optimizer-rank0.safetensors"}
    assert list_checkpoints(tmp_path)[0].size_bytes == sum(len(data) for data in FILES.values()) + 300
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_every_flipped_or_missing_byte_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    for name in [*FILES, "optimizer-rank0.safetensors"]:
        good = (path / name).read_bytes()
        for bad in (bytes([good[0] ^ 1]) + good[1:], good[:-1], good + b"x", b""):
            (path / name).write_bytes(bad)
            assert any(name in fault for fault in find_faults(path))
        (path / name).unlink()
        assert any(name in fault for fault in find_faults(path))
        (path / name).write_bytes(good)
    assert find_faults(path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 5}', '{"files": []}', '{"files": {"a": {}}}'])
def test_a_broken_manifest_is_a_broken_checkpoint(tmp_path: Path, content: str) -> None:
    path = save(tmp_path, 5)
    (path / MANIFEST).write_text(content)
    assert find_faults(path)
    assert latest_whole(tmp_path) is None


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
left = int(sys.argv[2])
def cut(event, args):
    # The audit hook sees every file operation of the process: at the one that is to be the last, it dies as by kill -9.
    global left
    is_write = event in ("os.rename", "os.mkdir", "shutil.rmtree", "os.remove") or (
        event == "open" and sys.argv[1] in str(args[0]) and args[1] not in ("r", "rb", None))
    if is_write:
        left -= 1
        if left < 0:
            os._exit(9)
from test_checkpoint_files import save
sys.addaudithook(cut)
save(Path(sys.argv[1]), int(sys.argv[3]), b"y" * 300)
"""


def save_and_die(output: Path, calls: int, step: int) -> int:
    code = KILLED.format(tests=str(Path(__file__).parent))
    words = [sys.executable, "-c", code, str(output), str(calls), str(step)]
    return subprocess.run(words, check=False).returncode


def test_a_kill_at_any_file_leaves_the_older_one_latest(tmp_path: Path) -> None:
    """Also when a checkpoint of the same step is replaced."""
    survived = False
    for calls in range(0, 40, 2):
        output = tmp_path / f"at{calls}"
        save(output, 3)
        if save_and_die(output, calls, 6) == 0:
            survived = True
            assert latest_whole(output) == "checkpoint-6"
            break
        assert latest_whole(output) == "checkpoint-3", calls
        remove_temporary(output)
        assert [path.name for path in output.iterdir()] == ["checkpoint-3"], calls
    assert survived and calls > 8


def test_a_save_over_the_same_step_never_leaves_less_than_the_older(tmp_path: Path) -> None:
    for calls in range(0, 60, 5):
        output = tmp_path / f"at{calls}"
        save(output, 3)
        save(output, 6)
        if save_and_die(output, calls, 6) == 0:
            assert (output / "checkpoint-6/optimizer-rank0.safetensors").read_bytes() == b"y" * 300
            break
        assert latest_whole(output) in ("checkpoint-3", "checkpoint-6")
    else:
        pytest.fail("no save came to its end")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import resource, signal; from pathlib import Path; from test_checkpoint_files import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
        "save(Path(sys.argv[1]), 6)"
    )
    save(tmp_path, 3)
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert "OSError: [Errno 27]" in ran.stderr
    assert latest_whole(tmp_path) == "checkpoint-3"


def test_retention(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    broken = save(tmp_path, 7)
    (broken / MANIFEST).unlink()
    stray = [tmp_path / name for name in ("checkpoint-old", "checkpoint-3-rolling", "checkpoint-best")]
    for path in stray:
        path.mkdir()
    assert prune_checkpoints(tmp_path, 0) == []
    assert prune_checkpoints(tmp_path, 2) == ["checkpoint-2", "checkpoint-1"]
    assert prune_checkpoints(tmp_path, 1, keep=frozenset({"checkpoint-9"})) == []
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-10", "checkpoint-9", "checkpoint-7", *(path.name for path in stray)}


def test_foreign_names_are_left_alone(tmp_path: Path) -> None:
    for name in (
        "checkpoint-old",
        "checkpoint-",
        "xcheckpoint-3",
        "checkpoint-3x",
        ".checkpoint-4-tmp",
        "checkpoint-٣",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    save(tmp_path, 5)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-5"]
    assert latest_whole(tmp_path) == "checkpoint-5"
    remove_temporary(tmp_path)
    assert not (tmp_path / ".checkpoint-4-tmp").exists() and (tmp_path / "checkpoint-old").exists()
    assert list_checkpoints(tmp_path / "absent") == []


def test_a_foreign_part_is_refused(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1, b"a" * 300), save(tmp_path, 2, b"b" * 300)
    shutil.copy(first / "optimizer-rank0.safetensors", second / "optimizer-rank0.safetensors")
    assert find_faults(second) == ["optimizer-rank0.safetensors does not match its SHA-256"]
