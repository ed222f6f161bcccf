"""Places to publish to and trackers, as people write them. training.md §2.9, §7.4."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from config_place import Place, errors, only, warnings

from simpletuner.config.publish_target import frozen_targets
from simpletuner.config.resolve import freeze
from simpletuner.config.train_config import option_fields

S3 = {"provider": "s3", "bucket": "results"}
KEYS = {"access_key_id": "a", "secret_access_key": "{env:S3_SECRET}"}
AT = "/--publishing_config"
_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "AWS_ACCESS_KEY_ID",
                "AWS_PROFILE", "WANDB_API_KEY", "WANDB_MODE")  # fmt: skip


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login of this machine's user, and every library installed: what is missing is a case of its own."""
    for name in _ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("S3_SECRET", "very-secret")
    for package in ("boto3", "wandb", "tensorboard"):
        (tmp_path / "packages" / package).mkdir(parents=True)
        (tmp_path / "packages" / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")


@pytest.mark.parametrize("value", [S3 | KEYS, [S3 | KEYS], json.dumps(S3 | KEYS), "places.json"])
def test_every_form_is_the_same_place(place: Place, value: Any) -> None:
    (place.workspace / "places.json").write_text(json.dumps([S3 | KEYS]))
    found = place.resolve(publishing_config=value)
    config, _, _ = freeze(found)
    (target,) = frozen_targets(config)
    assert config["publishing_config"] == [target.model_dump(mode="json")]
    assert target.url("checkpoint-3") == "s3://results/out/checkpoint-3", "under the output folder's name"
    assert config["publishing_config"][0]["secret_access_key"] == "very-secret"
    assert "very-secret" not in str(found.values) and "publishing_config" not in found.require().without_secrets()
    assert warnings(found) == {}


@pytest.mark.parametrize(
    ("value", "pointer", "code"),
    [
        ("[{", AT, "bad_json"),
        ("nowhere.json", AT, "bad_publishing"),
        ("results", AT, "bad_publishing"),
        (["results"], f"{AT}/0", "bad_publishing"),
        ({"bucket": "results"}, f"{AT}/provider", "bad_publishing"),
        ([S3 | KEYS, S3 | {"provider": "s4"}], f"{AT}/1/provider", "bad_publishing"),
        (S3 | {"provider": "azure_blob"}, f"{AT}/provider", "option_not_supported_yet"),
        ([S3 | {"provider": "dropbox"}], f"{AT}/0/provider", "option_not_supported_yet"),
        ({"provider": "s3"}, f"{AT}/bucket", "bad_publishing"),
        (S3 | {"bucket": "a/b"}, f"{AT}/bucket", "bad_publishing"),
        (S3 | {"buckt": "x"}, f"{AT}/buckt", "unknown_field"),
        (S3 | {"endpoint_url": "s3.example.com"}, f"{AT}/endpoint_url", "bad_publishing"),
        (S3 | {"endpoint_url": "https://me:key@example.com"}, f"{AT}/endpoint_url", "bad_publishing"),
        (S3 | {"access_key_id": "a"}, AT, "bad_publishing"),
        (S3 | {"provider": "backblaze_b2"} | KEYS, AT, "bad_publishing"),
        (S3 | {"secret_access_key": "{env:NOT_SET}"}, AT, "env_not_set"),
        ({"provider": "hub", "repo_id": "tiny"}, f"{AT}/repo_id", "bad_publishing"),
    ],
)
def test_a_wrong_shape_is_an_error_with_its_place(place: Place, value: Any, pointer: str, code: str) -> None:
    assert errors(place.resolve(publishing_config=value)) == {pointer: code}


def test_backblaze_is_found_by_its_region(place: Place) -> None:
    b2 = S3 | KEYS | {"provider": "backblaze_b2", "region": "us-west-004"}
    config, _, _ = freeze(place.resolve(publishing_config=b2))
    (target,) = frozen_targets(config)
    assert target.provider == "backblaze_b2" and target.endpoint == "https://s3.us-west-004.backblazeb2.com"


def test_the_hub_comes_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    options: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "me/tiny", "publishing_config": [S3 | KEYS]}
    found = place.resolve(push_to_hub_background=True, **options)
    assert warnings(found) == {"/--push_to_hub_background": "option_no_effect"}
    config, _, _ = freeze(found)
    assert [(target.provider, target.checkpoints) for target in frozen_targets(config)] == [
        ("hub", False), ("s3", True),
    ]  # fmt: skip
    assert frozen_targets(config)[0].url("") == "https://huggingface.co/me/tiny"
    config, _, _ = freeze(place.resolve(push_checkpoints_to_hub=True, **options))
    assert frozen_targets(config)[0].checkpoints


def test_another_hub_repository_takes_checkpoints_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.test/")
    value = [{"provider": "hub", "repo_id": "us/tiny"}]
    found = place.resolve(publishing_config=value, model_card_private=False, model_card_note="x")
    assert warnings(found) == {AT: "publishing_unavailable"}, "no token"
    (target,) = frozen_targets(freeze(found)[0])
    assert target.checkpoints and target.url("checkpoint-2") == "https://hub.test/us/tiny/tree/main/checkpoint-2"


def test_what_the_hub_needs(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert errors(place.resolve(push_to_hub=True)) == {"/--hub_model_id": "incompatible_options"}
    assert errors(place.resolve(push_to_hub=True, hub_model_id="my model")) == {"/--hub_model_id": "bad_value"}
    options: dict[str, Any] = {"push_to_hub": True, "hub_model_id": "me/tiny"}
    found = place.resolve(**options)
    assert found.ok and "HF_TOKEN" in only(found.warnings).hint
    assert warnings(found) == {"/--push_to_hub": "publishing_unavailable"}
    (tmp_path / "token").write_text("hf_x")
    assert warnings(place.resolve(**options)) == {}, "a login is as good"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in only(place.resolve(**options).warnings).message


def test_what_a_bucket_needs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    found = place.resolve(publishing_config=S3)
    assert found.ok and warnings(found) == {AT: "publishing_unavailable"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    assert warnings(place.resolve(publishing_config=S3)) == {}
    monkeypatch.setitem(sys.modules, "boto3", None)
    problem = only(place.resolve(publishing_config=S3).errors)
    assert (problem.code, problem.pointer, problem.hint) == ("publishing_unavailable", AT, "pip install boto3")


@pytest.mark.parametrize(
    "option",
    [
        "model_card_note", "model_card_safe_for_work", "model_card_private", "post_upload_script", "hub_model_id",
        "push_checkpoints_to_hub", "modelspec_comment",
    ],
)  # fmt: skip
def test_without_an_upload_nothing_acts(place: Place, option: str) -> None:
    value = {"hub_model_id": "me/tiny"}.get(option, True if option_fields()[option].kind == "boolean" else "x")
    assert warnings(place.resolve(**{option: value})) == {f"/--{option}": "option_no_effect"}


def test_a_script_uses_the_repository_without_an_upload(place: Place) -> None:
    found = place.resolve(hub_model_id="me/tiny", post_checkpoint_script="tell {huggingface_path}")
    assert warnings(found) == {}


def test_a_tracker_that_cannot_work_is_a_warning(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at = {"/--report_to": "tracker_unavailable"}
    assert warnings(place.resolve(report_to="tensorboard")) == {}
    found = place.resolve(report_to="wandb")
    assert found.ok and warnings(found) == at and "WANDB_API_KEY" in only(found.warnings).hint
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert warnings(place.resolve(report_to="wandb")) == {}
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert [problem.hint for problem in place.resolve(report_to="all").warnings] == [
        "pip install wandb", "pip install tensorboard",
    ]  # fmt: skip
