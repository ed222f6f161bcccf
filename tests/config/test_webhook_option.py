"""Webhook endpoints as people write them, and as they are shown. api.md §2.6."""

from __future__ import annotations

import json
from typing import Any

import pytest
from config_place import Place, errors, only, warnings

from simpletuner.config.resolve import freeze
from simpletuner.config.webhook import MASK, WebhookEndpoint, mask_webhooks, parse_webhooks, unmask_webhooks
from simpletuner.server.core import WEBHOOK_TEMPLATE

RAW = {"webhook_type": "raw", "callback_url": "https://example.com/simpletuner"}
DISCORD = {"webhook_type": "discord", "webhook_url": "https://discord.com/api/webhooks/1/token"}
AT = "/--webhook_config"


def endpoint(**more: Any) -> WebhookEndpoint:
    return WebhookEndpoint.model_validate(RAW | more)


@pytest.mark.parametrize(
    "value",
    [RAW, [RAW], json.dumps(RAW), json.dumps([RAW]), "hooks.json", "list.json", {"callback_url": RAW["callback_url"]}],
)
def test_every_form_is_the_same_endpoint(place: Place, value: Any) -> None:
    (place.workspace / "hooks.json").write_text(json.dumps(RAW))
    (place.config / "list.json").write_text(json.dumps([RAW]))
    found = place.resolve(webhook_config=value)
    config, _, _ = freeze(found)
    assert config["webhook_config"] == [endpoint().model_dump(mode="json")]
    assert endpoint().log_level == "info"
    assert endpoint().ssl_no_verify is False


def test_the_names_of_the_url_are_interchangeable() -> None:
    for name in ("callback_url", "webhook_url"):
        for kind in ("raw", "discord"):
            found, problems = parse_webhooks({"webhook_type": kind, name: "http://localhost:9000/x"})
            assert (found[0].callback_url, problems) == ("http://localhost:9000/x", [])


@pytest.mark.parametrize(
    ("value", "pointer", "code"),
    [
        ('[{"webhook_type": "raw"', AT, "bad_json"),
        ("nowhere.json", AT, "bad_webhook"),
        ("broken.json", AT, "bad_json"),
        ([{"webhook_type": "raw"}], f"{AT}/0/callback_url", "bad_webhook"),
        ([RAW, RAW | {"log_levl": "info"}], f"{AT}/1/log_levl", "unknown_field"),
        (RAW | {"log_level": "loud"}, f"{AT}/log_level", "bad_webhook"),
        (RAW | {"webhook_type": "slack"}, f"{AT}/webhook_type", "bad_webhook"),
        (RAW | {"callback_url": "ftp://example.com"}, f"{AT}/callback_url", "bad_webhook"),
        (RAW | {"callback_url": "example.com/x"}, f"{AT}/callback_url", "bad_webhook"),
        (RAW | {"callback_url": "http://"}, f"{AT}/callback_url", "bad_webhook"),
        (RAW | {"callback_url": "http://h:x/"}, f"{AT}/callback_url", "bad_webhook"),
        (RAW | {"callback_url": "https://me:password@example.com"}, f"{AT}/callback_url", "bad_webhook"),
        (RAW | {"callback_url": "http://169.254.169.254/latest"}, f"{AT}/callback_url", "bad_webhook"),
        (RAW | {"callback_url": "http://[fd00:ec2::254]/"}, f"{AT}/callback_url", "bad_webhook"),
        (DISCORD | {"webhook_url": "nonsense"}, f"{AT}/webhook_url", "bad_webhook"),
        (RAW | {"webhook_url": "https://example.com"}, f"{AT}/webhook_url", "bad_webhook"),
        (RAW | {"auth_token": "with\nline"}, f"{AT}/auth_token", "bad_webhook"),
        (RAW | {"auth_token": MASK}, f"{AT}/auth_token", "bad_webhook"),
        (RAW | {"events": ["training.*", 3]}, f"{AT}/events/1", "bad_webhook"),
        (["https://example.com"], f"{AT}/0", "bad_webhook"),
        ([RAW] * 21, AT, "bad_webhook"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_an_error_with_its_place(place: Place, value: Any, pointer: str, code: str) -> None:
    (place.workspace / "broken.json").write_text("[{")
    assert errors(place.resolve(webhook_config=value)) == {pointer: code}


def test_a_misspelled_field_is_guessed(place: Place) -> None:
    found = place.resolve(webhook_config=[RAW | {"log_levl": "info"}])
    assert only(found.errors).hint == "Did you mean log_level?"
    assert errors(place.argv(["--webhook_config", "[{"])) == {AT: "bad_json"}


def test_an_interval_without_endpoints_has_no_effect(place: Place) -> None:
    assert warnings(place.resolve(webhook_reporting_interval=5))["/--webhook_reporting_interval"] == "option_no_effect"
    assert "/--webhook_reporting_interval" not in warnings(
        place.resolve(webhook_reporting_interval=5, webhook_config=RAW)
    )


def test_placeholders_are_replaced_when_frozen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = RAW | {"auth_token": "{env:HOOK_TOKEN}", "callback_url": "{env:HOOK_URL}"}
    assert set(errors(place.resolve(webhook_config=[hook])).values()) == {"env_not_set"}
    monkeypatch.setenv("HOOK_TOKEN", "t-1")
    monkeypatch.setenv("HOOK_URL", "http://localhost/x")
    found = place.resolve(webhook_config=[hook])
    assert found.values["webhook_config"][0]["auth_token"] == "{env:HOOK_TOKEN}"
    config, provenance, _ = freeze(found)
    assert (config["webhook_config"][0]["auth_token"], config["webhook_config"][0]["callback_url"]) == (
        "t-1",
        "http://localhost/x",
    )
    assert provenance["webhook_config"]["value"][0]["auth_token"] == "{env:HOOK_TOKEN}"
    assert "webhook_config" not in found.require().without_secrets()


def test_levels_and_globs() -> None:
    assert endpoint().wants("log", "success")
    assert not endpoint().wants("log", "debug")
    assert not endpoint(log_level="warning").wants("log", "success")
    assert endpoint(log_level="error").wants("error", "critical")
    assert endpoint(log_level="debug").wants("log", "debug")
    chosen = endpoint(events=["training.*", "error"])
    assert [chosen.wants(name, "info") for name in ("training.progress", "error", "log")] == [True, True, False]


def test_secrets_are_masked_and_come_back() -> None:
    stored = [RAW | {"auth_token": "t", "secret": "s"}, DISCORD]
    shown = mask_webhooks(stored)
    assert shown == [
        RAW | {"auth_token": MASK, "secret": MASK},
        {"webhook_type": "discord", "webhook_url": f"https://discord.com/{MASK}"},
    ]
    assert mask_webhooks(json.dumps(stored)) == shown
    assert mask_webhooks("webhooks.json") == "webhooks.json"
    for kept in (stored, json.dumps(stored)):
        assert unmask_webhooks(shown, kept) == stored
        assert unmask_webhooks(MASK, kept) == kept
    assert unmask_webhooks(shown, "[{") == shown
    changed = [shown[1], shown[0] | {"log_level": "error"}]
    assert unmask_webhooks(changed, stored) == [DISCORD, stored[0] | {"log_level": "error"}]


def test_endpoints_that_look_alike_keep_their_own_secrets() -> None:
    stored = [DISCORD, DISCORD | {"webhook_url": "https://discord.com/api/webhooks/2/other"}]
    assert unmask_webhooks(mask_webhooks(stored), stored) == stored
    renamed = [{"webhook_type": "discord", "callback_url": f"https://discord.com/{MASK}"}]
    assert unmask_webhooks(renamed, stored)[0]["callback_url"] == DISCORD["webhook_url"]


def test_a_secret_never_follows_to_another_url() -> None:
    stored = [RAW | {"auth_token": "t"}]
    elsewhere = {"callback_url": "https://elsewhere.example", "auth_token": MASK}
    restored = unmask_webhooks([elsewhere], stored)
    assert restored == [elsewhere]
    assert [problem.pointer for problem in parse_webhooks(restored)[1]] == ["/0/auth_token"]


def test_the_template_is_valid() -> None:
    assert parse_webhooks(WEBHOOK_TEMPLATE)[1] == []


def test_a_shown_url_tells_no_secret() -> None:
    assert endpoint(callback_url="https://h.example/a?key=1").shown_url == "https://h.example/a?***"
    assert parse_webhooks(DISCORD)[0][0].shown_url == "https://discord.com/***"
