"""Who is told, and where results go. training.md §2.9."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import NonNegativeFloat

from simpletuner.config.option import OptionGroup, Ui


class PublishingOptions(OptionGroup):
    report_to: Annotated[str, Ui(tab="publishing", order=1, off="none")] = "none"
    """Trackers, comma-separated: `wandb`, `tensorboard`; `all` is both."""

    tracker_project_name: Annotated[str, Ui(tab="publishing", order=2)] = "simpletuner"
    """Project name at the tracker."""

    tracker_run_name: Annotated[str, Ui(tab="publishing", order=3)] = "simpletuner-testing"
    """Run name at the tracker."""

    webhook_config: Annotated[
        str | dict[str, Any] | list[Any] | None,
        Ui(tab="publishing", order=4, structured=True, secret=True),
    ] = None
    """Where events are posted: an object or a list of `{webhook_type: raw or discord, callback_url, log_level, events,
    auth_token, secret, message_prefix, ssl_no_verify}`, as JSON or the path of a JSON file."""

    webhook_reporting_interval: Annotated[NonNegativeFloat, Ui(tab="publishing", order=5)] = 0.0
    """Least seconds between two `training.progress` posts to an endpoint; the first and the last always go."""

    post_checkpoint_script: Annotated[str | None, Ui(tab="publishing", order=6, runs_command=True)] = None
    """Command that is run beside training after each checkpoint; `{placeholders}` are filled, there is no shell."""

    post_upload_script: Annotated[str | None, Ui(tab="publishing", order=7, runs_command=True)] = None
    """Command that is run beside training after each upload, with its address as `{remote_checkpoint_path}`."""

    push_to_hub: Annotated[bool, Ui(tab="publishing", order=8)] = False
    """Upload the result, with a model card, to the Hugging Face repository `hub_model_id`."""

    push_checkpoints_to_hub: Annotated[bool, Ui(tab="publishing", order=9)] = False
    """Upload each checkpoint there too, as `checkpoint-<step>/`."""

    hub_model_id: Annotated[str | None, Ui(tab="publishing", order=10)] = None
    """Repository `owner/name`; it is created if it is not there. Also `{huggingface_path}` of a script."""

    publishing_config: Annotated[
        str | dict[str, Any] | list[Any] | None,
        Ui(tab="publishing", order=11, structured=True, secret=True),
    ] = None
    """More places for results and checkpoints: an object or a list of `{provider: s3 or backblaze_b2, bucket, prefix,
    endpoint_url, region, access_key_id, secret_access_key, public_url, checkpoints}` or `{provider: hub, repo_id,
    checkpoints}`, as JSON or the path of a JSON file; keys as `{env:NAME}`."""

    model_card_private: Annotated[bool, Ui(tab="publishing", order=12)] = True
    """Whether a hub repository that is created is private; one that exists stays as it is."""

    model_card_safe_for_work: Annotated[bool, Ui(tab="publishing", order=13)] = False
    """Leave the tag `not-for-all-audiences` out of the model card."""

    model_card_note: Annotated[str | None, Ui(tab="publishing", order=14)] = None
    """Markdown of yours in the model card."""

    modelspec_comment: Annotated[str | None, Ui(tab="publishing", order=15)] = None
    """`modelspec.comment` in the header of an adapter's files."""


TRACKERS = ("wandb", "tensorboard")
TRACKERS_LATER = ("simpletuner", "comet_ml", "mlflow", "swanlab", "custom-tracker")


def tracker_names(report_to: str) -> list[str]:
    """The trackers of `report_to`, each once."""
    names = [name.strip() for name in report_to.split(",")]
    if "all" in names:
        return list(TRACKERS)
    return [name for name in dict.fromkeys(names) if name not in ("", "none")]
