"""Rules about trackers and publishing: what cannot be reached from here is said before a run starts."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from simpletuner.config.publish_target import OPTION, REPOSITORY, HubTarget, S3Target, Target, frozen_targets
from simpletuner.config.publishing_options import TRACKERS, TRACKERS_LATER, tracker_names
from simpletuner.config.script import SCRIPTS
from simpletuner.config.situation import Situation, error_about, warning_about
from simpletuner.errors import Problem

TRACKER_OPTIONS = ("tracker_project_name", "tracker_run_name")
_TRUE = ("1", "true", "yes", "on")


def tracker_rule(at: Situation) -> Iterator[Problem]:
    """A tracker that cannot work is left out by the run, which goes on: a warning."""
    names = tracker_names(at.values["report_to"])
    for name in names:
        if name in TRACKERS_LATER:
            yield error_about("option_not_supported_yet", "report_to", f"The tracker {name!r} is not supported yet.")
        elif name not in TRACKERS:
            hint = f"Known: none, {', '.join(TRACKERS)}."
            yield error_about("bad_choice", "report_to", f"There is no tracker {name!r}.", hint)
        elif not _is_installed(name):
            message = f"The tracker {name} is not installed: the run goes on without it."
            yield warning_about("tracker_unavailable", "report_to", message, f"pip install {name}")
        elif name == "wandb" and not _has_wandb_login():
            message = "wandb has no login here: the run goes on without it."
            yield warning_about(
                "tracker_unavailable", "report_to", message, "Set WANDB_API_KEY, or WANDB_MODE=offline."
            )
    for option in TRACKER_OPTIONS:
        if at.given(option) and not names and not _in_a_script(at, option):
            yield _idle(option, "there is no tracker (--report_to none)")


def publish_rule(at: Situation) -> Iterator[Problem]:
    yield from _hub_options(at)
    hub_id = at.values["hub_model_id"]
    if at.values["push_to_hub"] and (hub_id is None or not re.match(REPOSITORY, hub_id)):
        return
    targets = frozen_targets(at.values)
    for target in targets:
        if isinstance(target, HubTarget):
            yield from _hub_access(target, at)
        else:
            yield from _s3_access(target)
    yield from _without_effect(at, targets)


def _hub_options(at: Situation) -> Iterator[Problem]:
    hub_id = at.values["hub_model_id"]
    if hub_id is not None and not re.match(REPOSITORY, hub_id):
        yield error_about("bad_value", "hub_model_id", f"{hub_id!r} is no name of a repository.", "Write owner/name.")
    if at.values["push_to_hub"] and hub_id is None:
        message = "--push_to_hub needs --hub_model_id."
        yield error_about("incompatible_options", "hub_model_id", message, "Name the repository: owner/name.")
    if at.values["push_checkpoints_to_hub"] and not at.values["push_to_hub"]:
        yield _idle("push_checkpoints_to_hub", "--push_to_hub is off")


def _hub_access(target: HubTarget, at: Situation) -> Iterator[Problem]:
    option = "push_to_hub" if at.values["push_to_hub"] else OPTION
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        message = f"HF_HUB_OFFLINE is set: nothing can be uploaded to {target.repo_id}."
        yield warning_about("publishing_unavailable", option, message, "Unset it for the run.")
    elif not _has_hub_token():
        message = f"There is no token for the hub here: uploads to {target.repo_id} will fail, the run goes on."
        yield warning_about("publishing_unavailable", option, message, "Set HF_TOKEN, or log in with `hf auth login`.")


def _s3_access(target: S3Target) -> Iterator[Problem]:
    if not _is_installed("boto3"):
        yield error_about(
            "publishing_unavailable", OPTION, f"Publishing to {target.provider} needs boto3.", "pip install boto3"
        )
    keys = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    files = (Path("~/.aws/credentials"), Path("~/.aws/config"))
    has_keys = any(os.environ.get(name) for name in keys) or any(file.expanduser().is_file() for file in files)
    if target.access_key_id is None and not has_keys:
        message = f"There are no keys for the bucket {target.bucket!r} here: unless the machine itself has rights, "
        hint = 'Give "access_key_id" and "secret_access_key" as "{env:NAME}", or set AWS_ACCESS_KEY_ID.'
        yield warning_about("publishing_unavailable", OPTION, f"{message}uploads will fail; the run goes on.", hint)


def _without_effect(at: Situation, targets: list[Target]) -> Iterator[Problem]:
    if not targets:
        for option in ("model_card_note", "model_card_safe_for_work", "post_upload_script"):
            if at.given(option):
                yield _idle(option, "nothing is published (--push_to_hub, --publishing_config)")
    has_hub = any(isinstance(target, HubTarget) for target in targets)
    if at.given("model_card_private") and not has_hub:
        yield _idle("model_card_private", "nothing is published to a hub")
    if at.given("hub_model_id") and not at.values["push_to_hub"] and not _in_a_script(at, "huggingface_path"):
        yield _idle("hub_model_id", "--push_to_hub is off, and no script uses {huggingface_path}")
    if at.given("modelspec_comment") and at.values["model_type"] == "full":
        yield _idle("modelspec_comment", "only an adapter's file has a header for it (--model_type full)")


def _idle(option: str, reason: str) -> Problem:
    return warning_about("option_no_effect", option, f"--{option} has no effect: {reason}.")


def _in_a_script(at: Situation, placeholder: str) -> bool:
    return any(f"{{{placeholder}}}" in (at.values[script] or "") for script in SCRIPTS)


def _is_installed(package: str) -> bool:
    """A mere folder of this name, as wandb makes one, does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _has_hub_token() -> bool:
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(os.environ.get("HF_HOME") or cache) / "token")
    return file.expanduser().is_file()


def _has_wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
