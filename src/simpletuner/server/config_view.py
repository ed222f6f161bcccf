"""Configurations as clients see them: dashed names, and never a secret's value (api.md §1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel

from simpletuner.config.webhook import MASK, OPTION, mask_webhooks, unmask_webhooks
from simpletuner.server.asking import known_options
from simpletuner.server.core import Core
from simpletuner.store.job_row import JobRow


class JobConfig(BaseModel):
    config: dict[str, Any]
    datasets: list[Any]
    provenance: dict[str, Any]


def show_config(core: Core, job: JobRow) -> JobConfig:
    """What was frozen at submit. A value from `{env:NAME}` shows the placeholder that was written."""
    folder = core.placement.job_dir(job.job_id)
    frozen = folder.read_config()
    provenance: dict[str, dict[str, Any]] = {
        name: origin if isinstance(origin, dict) else {"layer": origin} for name, origin in frozen["provenance"].items()
    }
    values = {
        name: provenance[name]["value"] if _has_placeholder(provenance.get(name)) else value
        for name, value in cast(dict[str, Any], frozen["config"]).items()
    }
    secret = secret_names(values.get("model_family"))
    for name in secret & provenance.keys():
        shown = _masked(name, provenance[name].get("value"))
        provenance[name] = {"layer": provenance[name].get("layer"), "value": shown, "hidden": []}
    return JobConfig(
        config=mask({f"--{name}": value for name, value in values.items()}, secret),
        datasets=folder.read_datasets(),
        provenance={f"--{name}": origin for name, origin in provenance.items()},
    )


def secret_names(family: object) -> set[str]:
    return {option.name for option in known_options(family).values() if option.ui.secret}


def mask(config: Mapping[str, Any], secret: set[str]) -> dict[str, Any]:
    """`config` by dashed name."""
    return {
        name: _masked(bare, value) if (bare := name.removeprefix("--")) in secret else value
        for name, value in config.items()
    }


def unmask(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A masked value that comes back keeps what is stored."""
    kept = {name: stored[name] if value == MASK and name in stored else value for name, value in config.items()}
    option = f"--{OPTION}"
    if option in kept and option in stored:
        kept[option] = unmask_webhooks(kept[option], stored[option])
    return kept


def dashed(config: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling for each option; where both were written, the dashed one's value."""
    named = {name if name.startswith(("--", "__")) else f"--{name}": value for name, value in config.items()}
    return named | {name: value for name, value in config.items() if name.startswith("--")}


def _masked(name: str, value: Any) -> Any:
    """Of webhooks only the secrets inside are hidden: people want to see where events go."""
    return mask_webhooks(value) if name == OPTION else MASK if value else value


def _has_placeholder(origin: Mapping[str, Any] | None) -> bool:
    return origin is not None and "{env:" in str(origin.get("value"))
