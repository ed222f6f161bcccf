"""Numbers that are none, gradients of nothing: who is told, who is left out, when the run ends. training.md §9."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import Ran, TinyWorld

from simpletuner.checkpoints import BEST, list_checkpoints, prune_checkpoints
from simpletuner.data.cache import CacheStore
from simpletuner.data.loader import Members
from simpletuner.data.prepare import LATENTS, latent_key, text_key
from simpletuner.errors import ExitCode, UserError
from simpletuner.events import Journal
from simpletuner.families.base import build_family
from simpletuner.families.registry import load_spec
from simpletuner.job import Command, CommandName, JobDir
from simpletuner.train.inputs import Preparation
from simpletuner.train.quarantine import Quarantine
from simpletuner.train.report import Reporter
from simpletuner.train.requests import RequestReader
from simpletuner.train.sentinel import Judged, RollBack, Sentinel, Used

GOOD, NAN = (1.0, 1.0), (math.nan, math.nan)


def times(used: Used, step: int) -> torch.Tensor:
    """Not drawn: 100, 101, …"""
    return torch.arange(len(used.members.samples)) + 100


class Court:
    """A sentinel with a real reporter and one ledger."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.quarantine = Quarantine()
        self.ledger = folder / "ledger-set.jsonl"
        rows = [{"path": f"{name}.png", "status": "kept", "reason": None} for name in "abcdefgh"]
        self.ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.journal = folder / "events.jsonl"
        reporter = Reporter(Journal(self.journal, job_id="job"), folder)
        self.sentinel = Sentinel(self.quarantine, reporter, lambda name: self.ledger, times, **options)
        self.step = 0

    def see(self, value: tuple[float, float], *names: str) -> None:
        self.step += 1
        samples = tuple(f"set/{name}.png" for name in names)
        captions = tuple(f"a picture of {name}" for name in names)
        used = Used(Members(samples, (0,) * len(names), captions), torch.Size((len(names), 4, 8, 8)), 0)
        self.sentinel.see(Judged(self.step, *value, (used,)))

    def notices(self, code: str) -> list[dict[str, Any]]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [event for event in map(json.loads, lines) if event["data"].get("code") == code]


@pytest.fixture
def court(tmp_path: Path) -> Court:
    return Court(tmp_path)


def fresh_names() -> Iterator[str]:
    return (f"picture{number}" for number in range(10_000))


def test_a_bad_step_is_named_with_its_samples_captions_and_times(court: Court) -> None:
    for value in (GOOD, NAN, GOOD, (1.0, math.inf)):
        court.see(value, "a", "b")
        court.quarantine.strikes.clear()
    first, second = court.notices("nonfinite_step")
    assert first["data"]["step"] == 2 and second["data"]["step"] == 4
    assert "set/a.png" in first["message"] and first["data"]["samples"] == ["set/a.png", "set/b.png"]
    assert first["data"]["captions"] == ["a picture of a", "a picture of b"] and first["data"]["t"] == [100.0, 101.0]


@pytest.mark.parametrize("values", [[GOOD, NAN, NAN, NAN], [GOOD, NAN, GOOD] * 10])
def test_three_in_a_row_or_ten_in_a_hundred_are_the_end(court: Court, values: list[tuple[float, float]]) -> None:
    names = fresh_names()
    with pytest.raises(UserError) as caught:
        for value in values:
            court.see(value, next(names))
    assert (caught.value.code, caught.value.exit_code) == ("diverged", ExitCode.DIVERGED)


def test_two_in_a_row_or_few_of_many_are_not(court: Court) -> None:
    names = fresh_names()
    for value in [GOOD, NAN, NAN, GOOD] * 2 + ([GOOD] * 96 + [NAN] * 2 + [GOOD]) * 3:
        court.see(value, next(names))


def test_a_sample_that_spoils_two_updates_is_left_out_and_counts_no_more(court: Court) -> None:
    for others in ("ab", "cd", "ef", "gh", "ac", "bd", "eg"):
        court.see(NAN, "x", *others)
        court.see(GOOD, *others)
    assert court.quarantine.names == {"set/x.png"}, "its neighbours were with it once each while it was unknown"
    (notice,) = court.notices("sample_quarantined")
    assert notice["data"]["samples"] == ["set/x.png"] and notice["data"]["step"] == 3


def test_the_ledger_says_who_is_left_out(court: Court) -> None:
    court.see(NAN, "a")
    court.see(GOOD, "b")
    court.see(NAN, "a")
    rows = {row["path"]: row for row in map(json.loads, court.ledger.read_text().splitlines())}
    assert rows["a.png"]["status"] == "dropped" and rows["a.png"]["reason"] == "quarantined"
    assert rows["b.png"]["status"] == "kept" and len(rows) == 8


def test_rolling_back_leaves_out_at_once_and_not_for_ever(tmp_path: Path) -> None:
    court, names = Court(tmp_path, action="rollback"), fresh_names()
    for _ in range(2):
        with pytest.raises(RollBack):
            court.see(NAN, next(names))
        court.see(GOOD, next(names))
    court.sentinel.saved()
    for _ in range(3):
        with pytest.raises(RollBack):
            court.see(NAN, next(names))
        court.see(GOOD, next(names))
    with pytest.raises(UserError, match="not a number"):
        court.see(NAN, next(names))


def test_gradients_of_zero(court: Court) -> None:
    for value in [(1.0, 0.0)] * 19 + [GOOD] + [(1.0, 0.0)] * 19:
        court.see(value, "a")
    with pytest.raises(UserError) as caught:
        court.see((1.0, 0.0), "a")
    assert (caught.value.code, caught.value.exit_code) == ("dead_run", ExitCode.DIVERGED)


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([(1.0, 0.0)], True),
        ([(0.0, 0.0), GOOD], False),
        ([GOOD, (1.0, 0.0), GOOD], False),
        ([(math.nan, 0.0), GOOD], False),
    ],
    ids=["no effect", "nothing to learn from", "not the first", "no number"],
)
def test_an_adapter_without_any_gradient_ends_at_once(
    tmp_path: Path, values: list[tuple[float, float]], ends: bool
) -> None:
    court = Court(tmp_path, adapter="peft lora on 3 modules")
    if not ends:
        for value in values:
            court.see(value, "a")
        return
    with pytest.raises(UserError, match="peft lora on 3 modules") as caught:
        court.see(values[0], "a")
    assert (caught.value.code, caught.value.exit_code) == ("dead_run", ExitCode.DIVERGED)


def poison(world: TinyWorld, picture: str | None, caption: str | None, **options: Any) -> tuple[JobDir, str]:
    """Fill the caches as a run would, with values that are no numbers for one picture or caption."""
    config, job = world.resolve(**options).require(), world.job(**options)
    journal = job.open_journal()
    spec = load_spec("pixart_sigma")
    family = build_family(config, spec)
    reporter = Reporter(journal, job.artifacts)
    manifest = Preparation(config, family, reporter, RequestReader(job), torch.device("cpu")).discover(job.artifacts)[
        "tiny"
    ]
    journal.close()
    row = next(row for row in manifest.kept.tolist() if (picture or caption or "") in manifest.paths[row])
    if picture is not None:
        store = CacheStore(Path(config.image_datasets[0].cache_dir_vae))
        encoder = family.load_picture_encoder(torch.device("cpu"))
        width, height = manifest.plan(row).target
        key = latent_key(manifest, row, encoder.fingerprint)
        store.put({key: {LATENTS: torch.full((4, height // 8, width // 8), math.nan)}})
    else:
        store = CacheStore(Path(config.text_embeds.cache_dir))
        fingerprint = family.caption_fingerprint()
        text = manifest.captions.texts[manifest.captions.of(row)[0]]
        width = family.load_denoiser().config["caption_channels"]  # pyright: ignore
        store.put({text_key(text, fingerprint): {"prompt_embeds": torch.full((3, width), math.nan)}})
    return job, manifest.sample(row)


@pytest.mark.parametrize("what", ["picture", "caption"])
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_poisoned_sample_is_named_and_the_run_ends_well(world: TinyWorld, what: str, action: str) -> None:
    options = {"max_train_steps": 40, "checkpoint_step_interval": 2, "nonfinite_action": action,
               "caption_dropout_probability": 0.0, "output_dir": "poisoned"}  # fmt: skip
    target = {"picture": ("red_64x64", None), "caption": (None, "red_64x64")}[what]
    job, sample = poison(world, *target, **options)
    ran = world.main(job)
    assert ran.code == 0, ran.events[-1]
    named = {name for event in ran.notices("sample_quarantined") for name in event["data"]["samples"]}
    assert sample in named and len(named) <= 2
    assert all(sample in event["data"]["samples"] for event in ran.notices("nonfinite_step"))
    assert bool(ran.notices("rolled_back")) == (action == "rollback")
    assert all(value.isfinite().all() for value in ran.weights(40).values())
    assert [row["step"] for row in ran.metrics()] == list(range(1, 41))
    assert sum(row["loss"] is None for row in ran.metrics()) < 10
    rows = [json.loads(line) for line in (job.artifacts / "ledger-tiny.jsonl").read_text().splitlines()]
    assert next(row for row in rows if f"tiny/{row['path']}" == sample)["reason"] == "quarantined"
    assert len(rows) == 24


def test_what_was_asked_outlives_going_back(world: TinyWorld) -> None:
    """A request that comes with the step that goes wrong is answered after it, once."""
    options = {"max_train_steps": 30, "checkpoint_step_interval": 1, "nonfinite_action": "rollback",
               "caption_dropout_probability": 0.0, "output_dir": "asked-while-bad"}  # fmt: skip
    job, sample = poison(world, "red_64x64", None, **options)
    asked = False

    def ask(_count: int, loss: torch.Tensor) -> torch.Tensor:
        nonlocal asked
        if not loss.isfinite() and not asked:
            asked = True
            job.send(Command(command=CommandName.CHECKPOINT, request_id="mine"))
        return loss

    ran = world.main(job, ask)
    assert ran.code == 0 and asked and ran.notices("rolled_back")
    answers = [event["checkpoint"]["step"] for event in ran.of_type("training.checkpoint") if event.get("request_id")]
    assert len(answers) == 1, sample


def test_strikes_survive_a_restart(world: TinyWorld) -> None:
    options = {"max_train_steps": 40, "checkpoint_step_interval": 20, "caption_dropout_probability": 0.0}
    job, sample = poison(world, "red_64x64", None, **options)
    first = world.main(job)
    again = world.run(**options | {"max_train_steps": 80})
    assert first.code == again.code == 0
    assert not [event for event in again.notices("nonfinite_step") if sample in event["data"]["samples"]]


# --- the best checkpoint

HELD = {"id": "held", "dataset_type": "eval", "instance_data_dir": "held", "resolution": 64}


def with_held_out(world: TinyWorld) -> TinyWorld:
    (world.root / "held").mkdir()
    for path in sorted(world.pictures.glob("*_64x64.png"))[:4]:
        (world.root / "held" / path.name).write_bytes(path.read_bytes())
    world.entries = [*world.entries, HELD]
    return world


def held_losses(ran: Ran) -> dict[int, float]:
    return {event["data"]["step"]: event["data"]["value"] for event in ran.of_type("training.metric")}


def test_the_best_checkpoint_is_linked_and_kept(world: TinyWorld) -> None:
    options = {"max_train_steps": 12, "checkpoint_step_interval": 2, "checkpoints_total_limit": 2, "eval_timesteps": 2,
               "learning_rate": 0.02, "validation_step_interval": 0}  # fmt: skip
    ran = with_held_out(world).run(**options)
    losses = {step: loss for step, loss in held_losses(ran).items() if step and step % 2 == 0}
    assert sorted(losses) == [2, 4, 6, 8, 10, 12], "every checkpoint is rated"
    best = min(losses, key=lambda step: losses[step])
    link = ran.output / BEST
    assert link.is_symlink() and not link.readlink().is_absolute() and link.resolve().name == f"checkpoint-{best}"
    assert {folder.step for folder in list_checkpoints(ran.output)} == {best, 10, 12}
    assert prune_checkpoints(ran.output, 1) == (["checkpoint-10"] if best != 10 else [])
    assert link.exists()


def test_without_a_new_lowest_loss_the_run_ends_early(world: TinyWorld) -> None:
    options = {"max_train_steps": 60, "checkpoint_step_interval": 0, "early_stop_patience": 3, "eval_steps_interval": 2,
               "eval_timesteps": 2, "learning_rate": 0.5, "validation_step_interval": 0}  # fmt: skip
    ran = with_held_out(world).run(**options)
    assert ran.code == 0
    losses = held_losses(ran)
    last = max(losses)
    assert last < 60
    ordered = [losses[step] for step in sorted(losses)]
    assert min(ordered[:-3]) <= min(ordered[-3:]), "three evaluations without a new best, and not one more"
    assert (ran.output / f"checkpoint-{last}").exists() and (ran.output / "pipeline").exists()
    assert len(ran.notices("early_stop")) == 1
    assert ran.of_type("training.checkpoint")[-1]["checkpoint"]["is_final"]
    again = world.run(**options)
    assert again.code == 0 and not again.of_type("training.progress"), "it is at its end"
