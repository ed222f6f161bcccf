"""Uploads against a hub that is spoken to in its own protocol and a real S3 server. training.md §7.4, acceptance 49."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer
from safetensors import safe_open
from tiny_world import Ran, TinyWorld

from s3_server import Relay, S3Server
from simpletuner.checkpoints import MANIFEST, hash_file, write_manifest
from simpletuner.config.publish_target import S3Target
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import CommandName
from simpletuner.retry import Retry
from simpletuner.train.providers import open_provider
from simpletuner.train.publish import RESULT_MANIFEST
from simpletuner.train.upload import Uploaded, upload

TO_HUB: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "me/tiny"}
ADAPTER: dict[str, Any] = {"model_type": "lora", "lora_type": "standard", "lora_rank": 4, "learning_rate": 1e-2}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    server = HubServer()
    values = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for name, value in (values | {"HF_HOME": str(tmp_path / "hf")}).items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    pytest.importorskip("boto3")
    pytest.importorskip("moto")
    server = S3Server(tmp_path_factory.mktemp("s3") / "log")
    yield server
    server.close()


def bucket(url: str, **more: Any) -> dict[str, Any]:
    keys = {"access_key_id": "a", "secret_access_key": "{env:S3_SECRET}"}
    return {"provider": "s3", "bucket": "results", "endpoint_url": url, "region": "us-east-1"} | keys | more


def uploads(ran: Ran) -> list[dict[str, Any]]:
    return [event["data"] for event in ran.of_type("training.upload")]


def recording(folder: Path, *words: str) -> tuple[str, Path]:
    """A command that appends its words, as JSON, to a file."""
    folder.mkdir()
    (folder / "record.py").write_text(
        f"import json, sys\nopen({str(folder / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    )
    return " ".join([sys.executable, str(folder / "record.py"), *words]), folder / "calls"


def in_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_on_a_hub(shared: TinyWorld, tmp_path: Path, hub: HubServer) -> None:
    """The result at the top with its card, checkpoints in folders; what fails for a moment is tried again."""
    hub.failures = [503]
    script, calls = recording(tmp_path / "s", "{remote_checkpoint_path}", "{huggingface_path}", "{global_step}")
    ran = shared.run(
        output_dir="to-hub", push_checkpoints_to_hub=True, checkpoint_step_interval=2, post_upload_script=script,
        model_card_note="Mine & *yours*.", modelspec_comment="a comment", validation_disable=False,
        validation_prompt="red: `x`", validation_resolution=64, validation_num_inference_steps=1,
        validation_step_interval=0, disable_benchmark=True, **TO_HUB, **ADAPTER,
    )  # fmt: skip
    assert ran.code is ExitCode.DONE
    for step in (2, 4):
        here = in_folder(ran.output / f"checkpoint-{step}")
        assert {name: hub.files[f"checkpoint-{step}/{name}"] for name in here} == here
    top = {name for name in hub.files if not name.startswith("checkpoint-")}
    image = "model_card_images/step_4_validation_0_64x64.png"
    assert top == {
        "README.md", "pytorch_lora_weights.safetensors", "export/adapter_comfyui.safetensors", RESULT_MANIFEST, image,
    }  # fmt: skip
    assert all(hub.files[name] == (ran.output / name).read_bytes() for name in top)
    assert "pytorch_lora_weights.safetensors" in hub.through_lfs
    assert hub.repositories["me/tiny"]["visibility"] == "private"
    assert {key for path, key in hub.keys.items() if "me/tiny" in path} == {"Bearer hf_secret"}

    top_url = f"{hub.url}/me/tiny"
    urls = [f"{top_url}/tree/main/checkpoint-2", f"{top_url}/tree/main/checkpoint-4", top_url]
    told = uploads(ran)
    assert [(row["provider"], row["url"], row["status"], row["step"], row["is_final"]) for row in told] == [
        ("hub", url, "completed", step, is_final)
        for url, step, is_final in zip(urls, (2, 4, 4), (False, False, True), strict=True)
    ]
    assert told[2]["num_files"] == len(top) and told[2]["bytes"] == sum(len(hub.files[name]) for name in top)
    assert sorted(json.loads(line) for line in calls.read_text().splitlines()) == [
        [url, "me/tiny", step] for url, step in zip(sorted(urls), "424", strict=True)
    ]
    stages = [
        event["stage"]["status"] for event in ran.of_type("lifecycle.stage") if event["stage"]["key"] == "publish"
    ]
    assert stages[0] == "running" and stages[-1] == "completed"
    assert "hf_secret" not in ran.job.journal_path.read_text()

    with safe_open(ran.output / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["modelspec.comment"] == "a comment"
    with safe_open(ran.output / "export/adapter_comfyui.safetensors", "pt") as file:
        assert file.metadata()["modelspec.comment"] == "a comment"
    _, front, body = hub.files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["license"] == "apache-2.0" and card["pipeline_tag"] == "text-to-image"
    assert {"lora", "pixart_sigma", "not-for-all-audiences"} <= set(card["tags"])
    assert card["widget"] == [{"text": "red: `x`", "output": {"url": image}}]
    assert "base_model" not in card and str(shared.model) not in body, "a folder of this machine is nobody's business"
    assert "Mine & *yours*." in body and "    red: `x`" in body and f"]({image})" in body
    assert "| rank | `4` |" in body and "| steps | `4` |" in body


def test_a_run_in_a_bucket(shared: TinyWorld, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole pipeline and its checkpoints; a bucket that is not there is a warning, and the other is served."""
    monkeypatch.setenv("S3_SECRET", "very-secret")
    script, calls = recording(tmp_path / "s", "{remote_checkpoint_path}", "{local_checkpoint_path}")
    places = [
        bucket(s3.url, bucket="nowhere", checkpoints=False),
        bucket(s3.url, prefix="/mine/", public_url="https://cdn.test/b"),
    ]
    ran = shared.run(output_dir="to-s3", publishing_config=places, post_upload_script=script)
    assert ran.code is ExitCode.DONE
    kept, pipeline = s3.objects("mine"), ran.output / "pipeline"
    checkpoint = in_folder(ran.output / "checkpoint-4")
    assert {name: kept.pop(f"checkpoint-4/{name}") for name in checkpoint} == checkpoint
    assert kept == in_folder(pipeline) and {"model_index.json", "README.md"} <= kept.keys()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    head = s3.client.head_object(Bucket="results", Key=f"mine/{weights}")
    assert head["Metadata"]["sha256"] == hash_file(pipeline / weights)
    events = ran.of_type("training.upload")
    assert [(event["severity"], event["data"]["status"], event["data"]["url"]) for event in events] == [
        ("success", "completed", "https://cdn.test/b/mine/checkpoint-4"),
        ("warning", "failed", "s3://nowhere/to-s3"),
        ("success", "completed", "https://cdn.test/b/mine"),
    ]
    assert "NoSuchBucket" in events[1]["data"]["reason"]
    assert sorted(json.loads(line) for line in calls.read_text().splitlines()) == [
        ["https://cdn.test/b/mine", str(pipeline)],
        ["https://cdn.test/b/mine/checkpoint-4", str(ran.output / "checkpoint-4")],
    ]
    assert "very-secret" not in ran.job.journal_path.read_text() + (pipeline / "README.md").read_text()


def test_without_a_place_nothing_is_uploaded(shared: TinyWorld, tmp_path: Path) -> None:
    """Acceptance 49: the script is silent without an upload."""
    script, calls = recording(tmp_path / "s", "x")
    ran = shared.run(output_dir="nowhere", max_train_steps=1, post_upload_script=script)
    assert ran.code is ExitCode.DONE and uploads(ran) == [] and not calls.exists()
    assert not (ran.output / "pipeline/README.md").exists()


def test_a_checkpoint_is_kept_while_it_is_uploaded(shared: TinyWorld, hub: HubServer) -> None:
    output, seen = shared.root / "uploaded-kept", []

    def wait(path: str) -> None:
        while path.endswith("/preupload/main") and not (output / "checkpoint-4" / MANIFEST).exists():
            time.sleep(0.02)
        if path.endswith("/commit/main") and not seen:
            time.sleep(0.3)  # as long as a removal that should not be would take to show
            seen.append((output / "checkpoint-2" / MANIFEST).exists())

    hub.before = wait
    options = {"checkpoint_step_interval": 2, "checkpoints_total_limit": 1, "push_checkpoints_to_hub": True}
    ran = shared.run(output_dir="uploaded-kept", **options, **TO_HUB)
    assert seen == [True] and [row["status"] for row in uploads(ran)] == ["completed"] * 3
    assert "checkpoint-2/training_state.json" in hub.files


def offline(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_HUB_OFFLINE", "1")


def refusing(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    hub.failures = [403]


def refusing_lfs(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    hub.refused = "/lfs/"


def cutting(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    hub.before = lambda path: hub.files.update(dict.fromkeys(hub.files, b"")) if "paths-info" in path else None


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (offline, "HF_HUB_OFFLINE"),
        (refusing, "403"),
        (refusing_lfs, "b.safetensors"),
        (cutting, "c/a.json is not in me/tiny as it is here."),
    ],
)
def test_what_a_hub_refuses_is_said(
    shared: TinyWorld, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, state: Any, reason: str
) -> None:
    job = shared.job(output_dir="refused", **TO_HUB)
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.safetensors").write_bytes(bytes(1000))
    write_manifest(tmp_path, [tmp_path / "a.json", tmp_path / "b.safetensors"], 1)
    state(hub, monkeypatch)
    words = [sys.executable, "-m", "simpletuner.train.upload", str(job.root), "0", str(tmp_path), "c", MANIFEST]
    ended = subprocess.run(words, check=False, capture_output=True, text=True)
    said = json.loads(ended.stdout.splitlines()[-1])
    assert ended.returncode == 1 and reason in said["reason"]


@pytest.mark.parametrize("command", [CommandName.CANCEL, pytest.param(CommandName.STOP, marks=pytest.mark.slow)])
def test_an_end_abandons_what_does_not_come_through(shared: TinyWorld, hub: HubServer, command: CommandName) -> None:
    """At once, or after the ten seconds that a stop leaves; the checkpoints stay."""
    hub.before = lambda path: time.sleep(60)
    options = {"checkpoint_step_interval": 1, "push_checkpoints_to_hub": True, "max_train_steps": 50}
    began = time.monotonic()
    ran = shared.run_until(2, command, output_dir=f"end-{command}", **options, **TO_HUB)
    assert ran.code is ExitCode.STOPPED and time.monotonic() - began < 45
    told = uploads(ran)
    assert {row["status"] for row in told} == {"cancelled"} and len(told) == (1 if command == "cancel" else 2)
    assert (ran.output / "checkpoint-1" / MANIFEST).exists() and hub.files == {}


# --- one upload


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "empty").touch()
    (folder / "sub/b.bin").write_bytes(bytes(range(256)) * 300)
    write_manifest(folder, [path for path in folder.rglob("*") if path.is_file()], 1)
    return folder


def send(source: Path, url: str, waited: list[float]) -> Uploaded:
    target = S3Target.model_validate(bucket(url, prefix=source.parent.name, secret_access_key="b"))
    provider = open_provider(target, private=True)
    return upload(provider, source, "", MANIFEST, Retry(waited.append, (1.0, 2.0, 4.0)))


def test_a_busy_server_is_asked_again(source: Path, s3: S3Server) -> None:
    answers: list[int | None] = [503, 500, None, None, 503]
    relay = Relay(s3.port, lambda method, path: answers.pop(0) if answers and method == "PUT" else None)
    waited: list[float] = []
    done = send(source, relay.url, waited)
    assert waited == [1.0, 2.0, 1.0], "each file anew"
    kept = s3.objects(source.parent.name)
    assert kept == in_folder(source) and done.num_files == 4 and done.bytes == sum(map(len, kept.values()))


def test_a_server_that_stays_busy_is_given_up(source: Path, s3: S3Server) -> None:
    relay = Relay(s3.port, lambda method, path: 503)
    waited: list[float] = []
    with pytest.raises(UserError, match="SlowDown") as failed:
        send(source, relay.url, waited)
    assert failed.value.code == "upload_failed" and waited == [1.0, 2.0, 4.0]
    with pytest.raises(UserError) as unreachable:
        send(source, "http://127.0.0.1:9", waited := [])
    assert unreachable.value.code == "upload_failed" and len(waited) == 3


def test_large_files_go_in_parts_and_are_compared(source: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.train.providers._PART_BYTES", 5 << 20)
    (source / "large.bin").write_bytes(b"0123456789abcdef" * (11 << 16))
    write_manifest(source, [source / "large.bin"], 1)
    send(source, s3.url, [])
    key = f"{source.parent.name}/large.bin"
    assert s3.read(key) == (source / "large.bin").read_bytes()
    assert s3.client.head_object(Bucket="results", Key=key)["ETag"].endswith('-3"')


def test_what_arrives_changed_is_sent_again(source: Path, s3: S3Server) -> None:
    """Another writer spoils the first object between its upload and the comparison."""
    spoilt: list[str] = []

    def spoil(method: str, path: str) -> None:
        if method == "HEAD" and not spoilt:
            spoilt.append(path)
            s3.client.put_object(Bucket="results", Key=path.removeprefix("/results/"), Body=b"[]")

    waited: list[float] = []
    send(source, Relay(s3.port, spoil).url, waited)
    assert waited == [1.0] and spoilt == [f"/results/{source.parent.name}/a.json"]
    assert s3.objects(source.parent.name) == in_folder(source)


def test_what_changed_here_is_not_sent(source: Path, s3: S3Server) -> None:
    (source / "sub/b.bin").write_bytes(bytes(256) * 300)
    with pytest.raises(UserError, match=r"sub/b\.bin does not match its SHA-256") as failed:
        send(source, s3.url, [])
    assert failed.value.code == "upload_source_changed" and s3.objects(source.parent.name) == {}
