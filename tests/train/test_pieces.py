"""Generators, requests, what is due, metrics, prompts: the parts of the trainer that need no model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.config.prompt import parse_resolutions, plan_prompts
from simpletuner.config.validation_options import ValidationOptions
from simpletuner.data.loader import Members
from simpletuner.data.plan import Position
from simpletuner.errors import UserError
from simpletuner.events import Event, EventType
from simpletuner.job import Command, CommandName, JobDir, JobSpec
from simpletuner.train.due import Due
from simpletuner.train.metrics import Metrics, StepFacts, keep_metrics_until
from simpletuner.train.requests import Ended, RequestReader, Requests
from simpletuner.train.sentinel import Used
from simpletuner.train.state import TrainState, restore_rng, rng_tensors

CPU = torch.device("cpu")


def draws() -> list[float]:
    return [torch.rand(()).item(), torch.randn(()).item(), random.random(), random.gauss(0, 1), *np.random.randn(3)]


def test_generators_go_on_where_they_were() -> None:
    draws()  # leaves half of a pair of normal numbers behind in each library
    kept = {name: value.clone() for name, value in rng_tensors().items()}
    wanted = [draws(), draws()]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    restore_rng(kept)
    assert [draws(), draws()] == wanted


def test_the_state_survives_json() -> None:
    state = TrainState(step=5, position=Position(2, 3), samples=40)
    assert TrainState.from_dict(json.loads(json.dumps(state.as_dict()))) == state


def test_an_epoch_ends_with_the_step_that_reaches_the_next() -> None:
    state = TrainState()
    state.advance(Position(0, 2), 4)
    assert (state.step, state.samples, state.ended_epoch) == (1, 4, None)
    state.advance(Position(1, 0), 4)
    assert state.ended_epoch == 1
    state.advance(Position(1, 2), 4)
    assert state.ended_epoch is None


@pytest.fixture
def job(tmp_path: Path) -> JobDir:
    spec = JobSpec(job_id="j", workspace="w", config_dir="c", output_dir="o")
    return JobDir.create(tmp_path / "job", spec, config={}, provenance={}, datasets=[])


ENDS = [CommandName.STOP, CommandName.CANCEL, CommandName.YIELD]


@given(order=st.permutations(ENDS), signals=st.integers(0, 3), gone=st.sets(st.sampled_from(ENDS)))
def test_cancel_wins_over_stop_over_yield(order: list[CommandName], signals: int, gone: set[CommandName]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        spec = JobSpec(job_id="j", workspace="w", config_dir="c", output_dir="o")
        job = JobDir.create(Path(folder) / "job", spec, config={}, provenance={}, datasets=[])
        reader = RequestReader(job)
        sent = [command for command in order if command not in gone]
        for index, command in enumerate(sent):
            if index == signals:
                reader._on_signal(15, None)  # pyright: ignore[reportPrivateUsage]
            job.send(Command(command=command))
            reader.read()
        was_signalled = signals < len(sent)
        names = {command.value for command in sent} | ({"stop"} if was_signalled else set())
        wanted = next((name for name in ("cancel", "stop", "yield") if name in names), None)
        assert reader.read().end == wanted


def test_requests_are_taken_once(job: JobDir) -> None:
    reader = RequestReader(job)
    assert reader.read() == Requests()
    for command, name in ((CommandName.VALIDATE, "v"), (CommandName.CHECKPOINT, "c"), (CommandName.VALIDATE, "v")):
        job.send(Command(command=command, request_id=name))
    assert reader.read() == Requests(validate=("v",), checkpoint=("c",))
    assert reader.read() == Requests()


def test_a_torn_command_waits_for_its_end(job: JobDir) -> None:
    reader = RequestReader(job)
    line = Command(command=CommandName.STOP, request_id="s").model_dump_json().encode() + b"\n"
    with job.commands_path.open("ab", buffering=0) as file:
        file.write(line[:10])
        assert reader.read().end is None
        file.write(line[10:])
    assert reader.read().end == "stop"


def test_preparation_ends_only_for_an_end(job: JobDir) -> None:
    reader = RequestReader(job)
    job.send(Command(command=CommandName.VALIDATE, request_id="v"))
    reader.raise_if_ended()
    job.send(Command(command=CommandName.CANCEL))
    with pytest.raises(Ended) as caught:
        reader.raise_if_ended()
    assert caught.value.mode == "cancel"
    assert reader.read().validate == ("v",), "it waited for the loop"


def due(**keys: Any) -> Due:
    defaults: dict[str, Any] = {
        "total_steps": 10,
        "checkpoint_interval": 4,
        "validation_interval": 3,
        "validation_epochs": None,
        "eval_interval": None,
        "eval_epochs": None,
    }
    return Due(**defaults | keys)


def steps(check: Any, requests: Requests | None = None) -> list[int]:
    return [step for step in range(1, 11) if check(TrainState(step=step), requests or Requests())]


def test_what_is_due() -> None:
    assert steps(due().checkpoint) == [4, 8, 10]
    assert steps(due(checkpoint_interval=0).checkpoint) == [10]
    assert steps(due().checkpoint, Requests(checkpoint=("c",))) == list(range(1, 11))
    assert steps(due().checkpoint, Requests(end="stop")) == list(range(1, 11))
    assert steps(due().checkpoint, Requests(end="cancel", checkpoint=("c",))) == []
    assert steps(due().validation) == [3, 6, 9]
    assert steps(due(total_steps=9).validation) == [3, 6, 10][:2], "the last pass is drawn from the saved file"
    assert steps(due(validation_interval=0, eval_interval=5).validation) == [5]
    assert due(validation_interval=0, validation_epochs=2).images(TrainState(step=1, ended_epoch=2))
    assert not due(validation_interval=0, validation_epochs=2).images(TrainState(step=1, ended_epoch=3))


# --- metrics


MEMBERS = Members(("set/a.png", "set/b.png"), (0, 0), ("", "b"))


def metrics(path: Path, emitted: list[Event], total: int = 1000) -> Metrics:
    return Metrics(emitted.append, path, total, CPU, lambda judged: None)


def facts(step: int) -> StepFacts:
    return StepFacts(step, 0, 1e-4, 4, 0.0, (Used(MEMBERS, torch.Size((2, 4, 8, 8)), 0),))


def record(found: Metrics, step: int, loss: float = 1.0, norm: float = 1.0) -> None:
    found.record(facts(step), torch.tensor(loss), torch.tensor(norm))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_in_order_in_one_file(tmp_path: Path) -> None:
    path, emitted = tmp_path / "m.jsonl", list[Event]()
    found = metrics(path, emitted, 200)
    for step in range(1, 201):
        record(found, step, loss=step / 7)
    found.close()
    assert [row["step"] for row in rows(path)] == list(range(1, 201))
    assert [row["loss"] for row in rows(path)] == [torch.tensor(step / 7).item() for step in range(1, 201)]
    progress = [event.progress for event in emitted if event.type is EventType.TRAINING_PROGRESS]
    assert progress[0] is not None and progress[-1] is not None
    assert (progress[0].current, progress[-1].current, progress[-1].percent) == (1, 200, 100.0)
    assert len(progress) < 20


def test_rows_beyond_the_resumed_step_go(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    keep_metrics_until(path, 5)
    assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
    before = path.stat().st_mtime_ns
    keep_metrics_until(path, 5)
    assert path.stat().st_mtime_ns == before, "nothing to cut, nothing written"
    keep_metrics_until(path, 0)
    assert path.read_text() == ""
    keep_metrics_until(tmp_path / "absent.jsonl", 0)
    assert not (tmp_path / "absent.jsonl").exists()


# --- prompts


@pytest.mark.parametrize(
    ("written", "sizes"),
    [
        ("1024x1024", [(1024, 1024)]),
        ("96x64", [(96, 64)]),
        (512, [(512, 512)]),
        ("512", [(512, 512)]),
        ("1.0", [(1024, 1024)]),
        (0.25, [(512, 512)]),
        ("512, 96x64", [(512, 512), (96, 64)]),
        ([128, "96x64"], [(128, 128), (96, 64)]),
    ],
)
def test_sizes(written: Any, sizes: list[tuple[int, int]]) -> None:
    assert parse_resolutions(written) == sizes


def test_prompts_in_their_order() -> None:
    library = {"night bench": "a bench", "day": {"prompt": "a day", "adapter_strength": 1}}
    options = ValidationOptions(user_prompt_library=library, validation_prompt="test")
    assert [(prompt.shortname, prompt.text) for prompt in plan_prompts(options)] == [
        ("unconditional", ""), ("night_bench", "a bench"), ("day", "a day"), ("validation", "test"),
    ]  # fmt: skip
    assert plan_prompts(ValidationOptions(validation_disable_unconditional=True)) == []


@pytest.mark.parametrize("name", ["validation", "unconditional"])
def test_a_short_name_is_taken_once(name: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_prompts(ValidationOptions(user_prompt_library={name: "x"}, validation_prompt="y"))
    assert caught.value.code == "prompt_clash"


@given(st.text(min_size=1, max_size=100))
def test_short_names_are_file_names(name: str) -> None:
    import re

    found = plan_prompts(ValidationOptions(user_prompt_library={name: "x"}, validation_disable_unconditional=True))
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", found[0].shortname)
