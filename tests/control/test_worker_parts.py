"""Leases, tokens, shipments, storage, inputs and the choice of a worker: no server, no process."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.checkpoints import complete_checkpoint, list_checkpoints, temporary_folder
from simpletuner.errors import UserError
from simpletuner.job import JobDir, JobSpec
from simpletuner.jobs.inputs import InputIndex, locate, resume_of, tell
from simpletuner.jobs.job_token import Bearer, JobTokens
from simpletuner.jobs.leases import ACK_S, MARGIN_S, Leases
from simpletuner.jobs.scheduler import Candidate
from simpletuner.jobs.shipment import Shipments
from simpletuner.jobs.storage import OutputFile, Outputs, Storage, forget_incoming
from simpletuner.jobs.worker_choice import WorkerChoice, fits
from simpletuner.jobs.worker_slot import WorkerSlot
from simpletuner.store.assignments import Assignment
from simpletuner.worker.assignment import Assignment as Told
from simpletuner.worker.assignment import RunFolder
from simpletuner.worker.lease_clock import LeaseClock

LEASE_S = 120.0


def offer(epoch: int = 1, state: Any = "offered") -> Assignment:
    return Assignment(job_id="job", worker_id="w", epoch=epoch, state=state, offered_at="")


def allow() -> None:
    pass


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@given(steps=st.lists(st.tuples(st.sampled_from(["take", "renew", "wait"]), st.floats(0, 200)), max_size=30))
def test_the_runner_stops_before_its_lease_can_be_anothers(steps: list[tuple[str, float]]) -> None:
    """Whatever is lost on the way: while the runner may write, the server does not give its job away."""
    now = [0.0]
    leases = Leases(LEASE_S, clock=lambda: now[0])
    leases.offer(offer())
    clock: LeaseClock | None = None
    for what, seconds in steps:
        if what == "wait":
            now[0] += seconds
        else:
            sent_at = now[0]
            now[0] += seconds / 100  # on its way
            answered = leases.take("job", 1) if what == "take" else leases.renew("job", 1)
            if answered and clock is None:
                clock = LeaseClock(LEASE_S, sent_at, clock=lambda: now[0])
            elif answered and clock is not None:
                clock.renewed(sent_at)
        if clock is not None and clock.due() != "kill":
            assert leases.is_alive("job", 1)
    assert not leases.take("job", 2) and not leases.renew("job", 2)


def test_a_lease_that_is_over_stays_over() -> None:
    now = [0.0]
    leases = Leases(LEASE_S, clock=lambda: now[0])
    leases.offer(offer())
    assert not leases.renew("job", 1), "it must be taken first"
    now[0] = ACK_S
    assert not leases.take("job", 1) and not leases.is_held("job")
    leases.offer(offer(2))
    assert leases.take("job", 2) and leases.is_held("job")
    now[0] += LEASE_S + MARGIN_S
    assert not leases.renew("job", 2) and not leases.is_alive("job")
    leases = Leases(LEASE_S, [offer(2, "taken")], clock=lambda: now[0])
    assert leases.renew("job", 2), "a server that starts gives it a whole one"
    leases.drop("job")
    assert not leases.renew("job", 2) and leases.forget("job") == "w"


def test_the_clock_of_a_runner() -> None:
    now = [100.0]
    clock = LeaseClock(LEASE_S, 100.0, clock=lambda: now[0])
    for at, due in ((95.9, None), (96.0, "stop"), (113.9, "stop"), (114.0, "kill")):
        now[0] = 100 + at
        assert clock.due() == due
    clock.renewed(213.0)
    clock.renewed(150.0)  # an answer that was overtaken
    assert clock.due() is None
    clock.lose()
    assert clock.due() == "kill"


@given(st.text(max_size=90))
def test_no_token_but_a_minted_one_is_read(text: str) -> None:
    tokens, others = JobTokens(b"k" * 32), JobTokens(b"o" * 32)
    assert tokens.read(text) is None
    token = tokens.mint("a1b2", 7)
    assert tokens.read(token) == Bearer("a1b2", 7) and others.read(token) is None
    assert tokens.read(token.replace("_7_", "_8_")) is None


def test_the_key_of_tokens_outlives_a_server(tmp_path: Path) -> None:
    token = JobTokens.open(tmp_path / "key").mint("a", 1)
    assert JobTokens.open(tmp_path / "key").read(token) == Bearer("a", 1)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@given(content=st.binary(max_size=200), sent=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 80)), max_size=20))
def test_what_is_sent_twice_is_written_once(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, sent: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.mktemp("shipped") / "log.txt"
    path.write_bytes(b"earlier")
    shipments, start, end = Shipments(), 7, 0
    for first, count in [*sent, (0, len(content))]:
        part = content[first : first + count]
        if first > end:
            with pytest.raises(UserError, match="next byte"):
                shipments.append(path, part, start + first, start=start, check=allow)
        else:
            end = max(end, first + len(part))
            assert shipments.append(path, part, start + first, start=start, check=allow) == start + end
    with pytest.raises(UserError, match="next byte"):
        shipments.append(path, b"over the earlier epoch", 0, start=start, check=allow)
    assert path.read_bytes() == b"earlier" + content


@pytest.fixture
def job(tmp_path: Path) -> JobDir:
    spec = JobSpec(job_id="job", workspace=str(tmp_path), config_dir=str(tmp_path), output_dir=str(tmp_path / "output"))
    return JobDir.create(tmp_path / "jobs" / "job", spec, config={}, provenance={}, datasets=[])


def put(storage: Storage, path: str, content: bytes) -> None:
    handle = storage.open(f"output/{path}", 0)
    os.write(handle, content)
    os.close(handle)
    storage.finish(f"output/{path}", len(content), sha(content))


def listing(**files: bytes) -> Outputs:
    named = {name.replace("__", "/").replace("_", "-"): content for name, content in files.items()}
    return Outputs(files={name: OutputFile(bytes=len(body), sha256=sha(body)) for name, body in named.items()})


def test_a_checkpoint_is_there_whole_or_not_at_all(job: JobDir, tmp_path: Path) -> None:
    storage, output = Storage(job, 1), tmp_path / "output"
    wanted = listing(checkpoint_10__a=b"weights", checkpoint_10__b=b"rest", metrics=b"1")
    assert sorted(storage.missing(wanted)) == ["checkpoint-10/a", "checkpoint-10/b", "metrics"]
    put(storage, "checkpoint-10/a", b"weights")
    put(storage, "metrics", b"1")
    assert storage.missing(wanted) == ["checkpoint-10/b"] and [path.name for path in output.iterdir()] == [
        ".incoming-job-1"
    ]
    assert Storage(job, 2).missing(wanted) == sorted(wanted.files), "nothing of an older epoch counts"
    put(storage, "checkpoint-10/b", b"rest")
    storage.publish(wanted, checkpoint_limit=0)
    assert (output / "checkpoint-10/a").read_bytes() == b"weights" and (output / "metrics").read_bytes() == b"1"
    assert Storage(job, 2).missing(wanted) == [], "what is in place need not be sent again"
    # Made again by a later attempt, with one file that differs.
    again = listing(checkpoint_10__a=b"weights", checkpoint_10__b=b"other")
    later = Storage(job, 2)
    assert later.missing(again) == ["checkpoint-10/b"]
    put(later, "checkpoint-10/b", b"other")
    later.publish(again, checkpoint_limit=0)
    assert {path.name: path.read_bytes() for path in (output / "checkpoint-10").iterdir()} == {
        "a": b"weights",
        "b": b"other",
    }
    forget_incoming(job)
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-10", "metrics"]
    (output / "checkpoint-10/a").unlink()
    assert later.missing(again) == ["checkpoint-10/a"], "somebody has removed it"


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", "a//b", "./a", "a/", ".."])
def test_a_runner_names_files_of_the_output_folder_and_no_others(path: str) -> None:
    with pytest.raises(ValueError, match="plain path"):
        Outputs.model_validate({"files": {path: {"bytes": 1, "sha256": "0" * 64}}})


def test_an_upload_goes_on_where_it_was_broken_off(job: JobDir) -> None:
    storage = Storage(job, 1)
    handle = storage.open("output/model", 0)
    os.write(handle, b"first ")
    os.close(handle)
    assert storage.received("output/model") == (6, False)
    with pytest.raises(UserError, match="goes on at byte 6"):
        storage.open("output/model", 3)
    handle = storage.open("output/model", 6)
    os.write(handle, b"second")
    os.close(handle)
    with pytest.raises(UserError, match="SHA-256"):
        storage.finish("output/model", 12, sha(b"something else"))
    assert storage.received("output/model") == (0, False)
    for bad in ("output", "../x", "output/../../x", "artifacts/a/b", "/etc/passwd", "output/.x.part", "secrets/a"):
        with pytest.raises(UserError) as refused:
            storage.received(bad)
        assert refused.value.code == "bad_path"


def test_a_job_is_told_in_places_and_put_together_again(tmp_path: Path) -> None:
    pictures, model = tmp_path / "pictures", tmp_path / "model"
    for folder in (pictures / "deep", model):
        folder.mkdir(parents=True)
    (pictures / "deep" / "a.png").write_bytes(b"a")
    (tmp_path / "rows.csv").write_text("url\n")
    config: dict[str, Any] = {
        "output_dir": str(tmp_path / "output"), "pretrained_model_name_or_path": str(model), "cache_dir": None,
        "cache_dir_text": str(tmp_path / "cache"), "cache_dir_vae": None, "init_lora": None,
        "resume_from_checkpoint": str(tmp_path / "output" / "checkpoint-5"), "seed": 3,
    }  # fmt: skip
    datasets = [
        {"id": "a", "instance_data_dir": str(pictures), "cache_dir_vae": str(tmp_path / "cache/vae")},
        {"id": "b", "csv_file": str(tmp_path / "rows.csv")},
        {"id": "text", "cache_dir": str(tmp_path / "cache")},
    ]
    told = tell(config, datasets)
    assert str(tmp_path) not in str((told.config, told.datasets)), "no path of the server is left"
    assert told.config["resume_from_checkpoint"] == "checkpoint-5" == resume_of(config, continues=False)
    assert told.config["cache_dir_text"] == told.datasets[2]["cache_dir"], "one cache stays one"
    folder = RunFolder(tmp_path / "worker", "job", 1)
    assignment = Told(
        server_url="http://x", job_id="job", epoch=1, attempt=1, provenance={}, resume_from=None, best=None,
        spec=JobSpec(job_id="job", workspace="/w", config_dir="/w", output_dir=config["output_dir"]),
        config=told.config, datasets=told.datasets, upload_endpoint="/", upload_token="t", lease_s=1, heartbeat_s=1,
        places=list(told.places),
        secrets={},
    )  # fmt: skip
    local = folder.create_job(assignment)
    frozen = local.read_config()["config"]
    assert frozen["seed"] == 3 and frozen["output_dir"] == local.read_spec().output_dir == str(folder.output)
    entries = local.read_datasets()
    assert Path(entries[0]["instance_data_dir"]).is_relative_to(folder.path)
    assert Path(entries[1]["csv_file"]).name == "rows.csv"
    assert Path(entries[2]["cache_dir"]).is_relative_to(tmp_path / "worker" / "caches")
    line = f'{{"path":"{folder.output}/x"}}'.encode()
    for here, there in folder.server_paths(assignment):
        line = line.replace(here, there)
    assert line == f'{{"path":"{config["output_dir"]}/x"}}'.encode()
    assert locate(told.places, "dataset-0", "deep/a.png") == pictures / "deep/a.png"
    for place, path in (("dataset-0", "../rows.csv"), ("dataset-0", str(tmp_path / "rows.csv")), ("nowhere", "x")):
        assert locate(told.places, place, path) is None
    assert locate(told.places, "csv-1", "") == tmp_path / "rows.csv"


def test_what_did_not_change_is_not_read_again(job: JobDir, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"a")
    told = tell(
        {"output_dir": str(tmp_path / "output"), "pretrained_model_name_or_path": "hub/name"},
        [{"id": "a", "instance_data_dir": str(pictures)}],
    )
    [first] = InputIndex(job, told.places, None).build()["dataset-0"]
    assert (first.path, first.bytes, first.sha256) == ("a.png", 1, sha(b"a"))
    # Only somebody who reads it would see that: same size, same time.
    (pictures / "a.png").write_bytes(b"b")
    os.utime(pictures / "a.png", ns=(first.mtime_ns, first.mtime_ns))
    assert InputIndex(job, told.places, None).build()["dataset-0"] == [first]
    os.utime(pictures / "a.png", ns=(1, 1))
    assert InputIndex(job, told.places, None).build()["dataset-0"][0].sha256 == sha(b"b")


def test_of_the_output_the_newest_checkpoint_is_needed(job: JobDir, tmp_path: Path) -> None:
    output = tmp_path / "output"
    for step in (5, 10, 15):
        folder = temporary_folder(output, step)
        (folder / "weights").write_text(str(step))
        complete_checkpoint(folder, output, step)
    (output / "checkpoint-20").mkdir()
    (output / "metrics.jsonl").write_text("{}")
    assert [folder.step for folder in list_checkpoints(output)] == [20, 15, 10, 5]
    told = tell({"output_dir": str(output), "pretrained_model_name_or_path": "hub/name"}, [])
    for resume, names in (("latest", {"checkpoint-15"}), ("checkpoint-5", {"checkpoint-15", "checkpoint-5"})):
        paths = {file.path for file in InputIndex(job, told.places, resume).build()["output"]}
        assert {path.split("/")[0] for path in paths} == names | {"metrics.jsonl"}
    assert "output" not in InputIndex(job, told.places, None).build()


SLOTS = st.lists(
    st.builds(
        WorkerSlot,
        worker_id=st.sampled_from("abcdef"),
        name=st.just("n"),
        num_devices=st.integers(1, 4),
        status=st.sampled_from(["idle", "idle", "busy", "draining", "quarantined", "offline", "connecting"]),
        labels=st.dictionaries(
            st.sampled_from(["gpu", "zone"]), st.sampled_from(["a100-80", "h100", "A100"]), max_size=2
        ),
        memory_bytes=st.sampled_from([None, 24, 80]),
        idle_since=st.floats(0, 100),
    ),
    max_size=6,
    unique_by=lambda slot: slot.worker_id,
)
NEEDS = st.lists(
    st.builds(
        Candidate,
        job_id=st.just("j"),
        order=st.just(1),
        queued_at=st.just(datetime(2026, 1, 1, tzinfo=UTC)),
        num_devices=st.integers(1, 4),
        peak_bytes=st.sampled_from([None, 10, 50]),
        worker_labels=st.dictionaries(
            st.sampled_from(["gpu", "zone"]), st.sampled_from(["a100*", "*", "h?00"]), max_size=2
        ),
    ),
    max_size=8,
)


@given(slots=SLOTS, needs=NEEDS)
def test_a_worker_is_given_once_to_whom_it_fits_the_longest_idle_first(
    slots: list[WorkerSlot], needs: list[Candidate]
) -> None:
    choice = WorkerChoice(slots)
    left = {slot.worker_id: slot for slot in slots if slot.status == "idle"}
    for need in needs:
        fitting = [slot for slot in left.values() if fits(slot, need)]
        taken = choice.take(need)
        if taken is None:
            assert not fitting
            known = [slot for slot in slots if slot.status != "offline" and fits(slot, need)]
            code, reason = choice.why(need)
            assert code == ("workers_busy" if known else "no_matching_worker") and reason.endswith(".")
        else:
            assert left[taken].idle_since == min(slot.idle_since for slot in fitting) and taken in {
                slot.worker_id for slot in fitting
            }
            del left[taken]
