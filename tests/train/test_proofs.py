"""`verify-resume`, `replay` and `run_lock.json`. training.md §6.2, 6.4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_world import OPTIONS, Ran, TinyWorld

from simpletuner.checkpoints import MANIFEST, complete_checkpoint, hash_file
from simpletuner.cli.main import main
from simpletuner.errors import UserError
from simpletuner.job import CommandName
from simpletuner.jobs.equality import compare_runs
from simpletuner.run_lock import LOCK, read_lock

DRAWS: dict[str, Any] = {"validation_disable": False, "validation_prompt": "red", "validation_resolution": 64}


@pytest.fixture
def environment(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> TinyWorld:
    """`config/tiny`, which averages its weights, draws images and starts a program after each checkpoint."""
    folder = world.root / "config/tiny"
    folder.mkdir(parents=True)
    told = world.root / "told"
    options = {
        **OPTIONS,
        **DRAWS,
        "pretrained_model_name_or_path": str(world.model),
        "use_ema": True,
        "gradient_accumulation_steps": 2,
        "post_checkpoint_script": f"touch {told}",
    }
    (folder / "config.json").write_text(json.dumps({f"--{name}": value for name, value in options.items()}))
    (world.root / "data.json").write_text(json.dumps(world.entries))
    monkeypatch.chdir(world.root)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return world


def lock_of(ran: Ran) -> dict[str, Any]:
    return json.loads((ran.output / LOCK).read_text())


def changed_lock(ran: Ran, place: Path, **changes: Any) -> str:
    (place / "changed.json").write_text(json.dumps(lock_of(ran) | changes))
    return str(place / "changed.json")


# --- verify-resume


@pytest.mark.long
def test_a_killed_run_is_shown_to_go_on_exactly(environment: TinyWorld, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify-resume", "tiny", "--steps", "4", "--kills", "2", "--seed", "3", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["seed"], len(found["killed_after_micro_steps"])) == (True, 3, 2)
    assert all(2 < done < 8 for done in found["killed_after_micro_steps"])
    parts = {row["part"].split()[-1] if "losses" in row["part"] else row["part"] for row in found["compared"]}
    assert parts == {
        "rates",
        "place in the data",
        "weights",
        "moving average",
        "optimizer state",
        "generators",
        "description",
    }
    assert not (environment.root / "out").exists() and not (environment.root / "told").exists()
    assert list((environment.root / ".simpletuner/scratch").iterdir()) == []
    assert list((environment.root / "cache").rglob("*.index"))


@pytest.mark.parametrize("words", [["--steps", "2"], ["--kills", "0"], ["--steps", "3", "--kills", "5"]])
def test_places_to_be_killed_at_run_out(
    environment: TinyWorld, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["verify-resume", "tiny", *words, "gradient_accumulation_steps=1"])
    assert code == 64 and "too_few_steps" in capsys.readouterr().err


def test_a_run_that_fails_says_why(environment: TinyWorld, capsys: pytest.CaptureFixture[str]) -> None:
    next(environment.pictures.glob("*.png")).write_bytes(b"no picture")
    assert main(["verify-resume", "tiny"]) == 65
    assert "data_defects" in capsys.readouterr().err
    assert list((environment.root / ".simpletuner/scratch").iterdir()) == []


def test_the_first_tensor_that_differs_is_named(shared: TinyWorld, tmp_path: Path) -> None:
    ran = shared.run(output_dir="compared", max_train_steps=2, use_ema=True)
    other = Path(shutil.copytree(ran.output, tmp_path / "other"))
    assert {row.difference for row in compare_runs(ran.output, other)} == {""}
    checkpoint = other / "checkpoint-2"
    tensors = load_file(checkpoint / "optimizer-rank0.safetensors")
    last = sorted(name for name, value in tensors.items() if value.is_floating_point())[-1]
    flipped = tensors[last].clone().flatten()
    flipped[-1] = torch.nextafter(flipped[-1], torch.tensor(9.0))
    save_file(tensors | {last: flipped.view(tensors[last].shape)}, checkpoint / "optimizer-rank0.safetensors")
    (checkpoint / MANIFEST).unlink()
    complete_checkpoint(checkpoint.rename(other / ".checkpoint-2-tmp"), other, 2)
    metrics = (other / "training_metrics.jsonl").read_text().splitlines()
    row = json.loads(metrics[1])
    metrics[1] = json.dumps(row | {"loss": row["loss"] * (1 + 2**-52)})
    (other / "training_metrics.jsonl").write_text("\n".join(metrics) + "\n")
    differing = {row.name: row.difference for row in compare_runs(ran.output, other) if row.difference}
    assert differing.keys() == {"optimizer-rank0.safetensors", "training_metrics.jsonl"}
    assert differing["optimizer-rank0.safetensors"].startswith(f"{last} is the first tensor")
    assert differing["training_metrics.jsonl"].startswith("loss of step 2")


# --- run_lock.json and replay


def test_a_lock_says_what_a_run_was_made_of(world: TinyWorld) -> None:
    secret = [{"webhook_type": "raw", "callback_url": "http://127.0.0.1:9/x", "auth_token": "hush"}]
    ran = world.run(max_train_steps=3, webhook_config=secret)
    lock = lock_of(ran)
    assert [float.fromhex(loss) for loss in lock["losses"]] == ran.losses()
    assert (lock["seed"], lock["device"], lock["job_id"]) == (11, "cpu", ran.job.root.name)
    assert lock["data"]["tiny"]["kept"] == 24 and len(lock["data"]["tiny"]["fingerprint"]) == 64
    assert lock["versions"]["torch"] == torch.__version__ and "simpletuner" in lock["versions"]
    assert lock["provenance"]["seed"]["layer"] == "request" and lock["config"]["learning_rate"] == 1e-3
    assert "hush" not in (ran.output / LOCK).read_text()
    # Going on adds a name; starting anew is another run.
    again = world.run(max_train_steps=4, learning_rate=2e-3)
    assert lock_of(again)["continued_by"] == [again.job.root.name]
    assert lock_of(again)["config"] == lock["config"] and lock_of(again)["losses"] == lock["losses"]
    afresh = world.run(max_train_steps=2, resume_from_checkpoint="")
    assert (lock_of(afresh)["job_id"], lock_of(afresh)["continued_by"]) == (afresh.job.root.name, [])


def test_a_cancelled_run_keeps_its_last_losses(shared: TinyWorld) -> None:
    ran = shared.run_until(3, CommandName.CANCEL, output_dir="cancelled-lock")
    steps = ran.of_type("training.status")[-1]["data"]["global_step"]
    assert steps > 1 and [row["step"] for row in ran.metrics()] == list(range(1, steps + 1))
    assert len(lock_of(ran)["losses"]) == steps


def test_a_lock_without_losses_has_them_beside_it(shared: TinyWorld) -> None:
    ran = shared.run(output_dir="killed-lock", max_train_steps=3)
    (ran.output / LOCK).write_text(json.dumps(lock_of(ran) | {"losses": []}))
    assert [float.fromhex(loss or "") for loss in read_lock(ran.output / LOCK).losses] == ran.losses()


@pytest.mark.parametrize("content", ["", "{", '{"job_id": 3}', None])
def test_what_is_no_lock(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / LOCK).write_text(content)
    with pytest.raises(UserError) as caught:
        read_lock(tmp_path / LOCK)
    assert caught.value.code == ("run_lock_missing" if content is None else "run_lock_unreadable")


@pytest.mark.long
def test_a_replay_finds_the_same_losses(environment: TinyWorld, capsys: pytest.CaptureFixture[str]) -> None:
    """By job id, of the foreground too; the schedule is that of the whole run."""
    assert main(["train", "--env", "tiny", "lr_scheduler=cosine", "max_train_steps=8", "validation_disable=true"]) == 0
    job_id = next((environment.root / ".simpletuner/foreground").glob("*/spec.json")).parent.name
    before = {path: hash_file(path) for path in (environment.root / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["replay", job_id, "--steps", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] and found["changed"] == [] and len(found["losses"]) == 4
    assert found["losses"] == json.loads((environment.root / "out" / LOCK).read_text())["losses"][:4]
    assert {path: hash_file(path) for path in (environment.root / "out").rglob("*") if path.is_file()} == before
    assert list((environment.root / ".simpletuner/scratch").iterdir()) == []


@pytest.mark.long
def test_a_replay_names_what_changed(environment: TinyWorld, capsys: pytest.CaptureFixture[str]) -> None:
    ran = environment.run(max_train_steps=3)
    versions = lock_of(ran)["versions"] | {"torch": "1.0"}
    losses = lock_of(ran)["losses"]
    losses[1] = (float.fromhex(losses[1]) * (1 + 2**-52)).hex()
    capsys.readouterr()
    assert main(["replay", changed_lock(ran, environment.root, versions=versions, losses=losses)]) == 70
    said = capsys.readouterr().out
    assert "part at step 2" in said and "torch: '1.0' then" in said


def test_a_replay_names_the_dataset_that_changed(environment: TinyWorld, capsys: pytest.CaptureFixture[str]) -> None:
    ran = environment.run(max_train_steps=2)
    next(environment.pictures.glob("*.png")).unlink()
    capsys.readouterr()
    assert main(["replay", str(ran.output / LOCK)]) == 65
    said = capsys.readouterr().err
    assert "dataset_changed" in said and "tiny is not what it was (24 samples then, 23 now)" in said


def test_a_replay_of_what_is_not_there(environment: TinyWorld, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "abcdef123456"]) == 64
    assert "unknown_job" in capsys.readouterr().err
    ran = environment.run(max_train_steps=1)
    assert main(["replay", str(ran.output / LOCK), "--steps", "0"]) == 64
    assert "nothing_to_replay" in capsys.readouterr().err
    shutil.copytree(ran.job.root, environment.root / ".simpletuner/jobs/older")
    assert main(["replay", "older"]) == 64
    assert "run_lock_missing" in capsys.readouterr().err
