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

    post_upload_script: Annotated[str | None, Ui(tab="publishing", order=7, later=True, runs_command=True)] = None
    """Command that is run after each upload."""


TRACKERS = ("wandb", "tensorboard")
TRACKERS_LATER = ("simpletuner", "comet_ml", "mlflow", "swanlab", "custom-tracker")


def tracker_names(report_to: str) -> list[str]:
    """The trackers of `report_to`, each once."""
    names = [name.strip() for name in report_to.split(",")]
    if "all" in names:
        return list(TRACKERS)
    return [name for name in dict.fromkeys(names) if name not in ("", "none")]
