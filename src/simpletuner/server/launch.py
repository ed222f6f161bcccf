"""Starts a checked configuration as a job: for the start route, `server --env` and the queue (api.md §2.4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config.device_numbers import read_numbers
from simpletuner.config.directories import Directories
from simpletuner.config.environments import Environments
from simpletuner.config.resolve import freeze, resolve
from simpletuner.errors import Level, Problem, UserError
from simpletuner.job import ACTIVE, JobStatus, new_job_id
from simpletuner.jobs.submit import Submission, Submitted, submit
from simpletuner.server.asking import ADHOC, Asked, ask, known_options
from simpletuner.server.core import Core
from simpletuner.server.identity import LOCAL, Identity
from simpletuner.server.option_body import OptionBody
from simpletuner.server.owners import may_change
from simpletuner.server.peak import foresee_peak
from simpletuner.server.settings import ServerSettings
from simpletuner.store.job_row import Claim
from simpletuner.store.settings import ACTIVE_ENVIRONMENT

NOT_WRITTEN = Problem(
    code="environment_not_written",
    message="The settings were not stored in an environment: you may not change it. The job runs with them.",
    hint="Copy the environment, activate the copy and start that.",
    level=Level.WARNING,
)

MOST_ATTEMPTS = {"auto": 1, "local": 1, "worker": 3}
"""By target, unless a submit says otherwise."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """`priority` follows the user's level; `priority_override` is what was asked for in its place."""

    no_wait: bool = False
    any_gpu: bool = False
    priority: int
    priority_override: int | None = None
    target: str = "auto"
    worker_labels: dict[str, str] | None = None
    for_approval: bool = False
    max_attempts: int | None = None
    retry_of: str | None = None
    user_id: str | None = None
    user_name: str | None = None
    claim: Claim | None = None
    writes_environment: bool = True


@dataclass(frozen=True, kw_only=True)
class Launched:
    submitted: Submitted
    config_name: str
    config_written: Path | None


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A checked configuration as its job will have it."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    datasets: list[Any]


def launch(core: Core, asked: Asked, options: LaunchOptions) -> Launched:
    """Raises UserError `invalid_config` or `gpus_unavailable`, with nothing written, or `in_flight`."""
    config, provenance, datasets = freeze(asked.resolution)
    job_id = new_job_id()
    name = asked.environment or f"{ADHOC}{job_id}"
    frozen = Frozen(config=config, provenance=provenance, datasets=datasets)

    def write_environment() -> None:
        _write_environment(core, asked, name, owner=options.user_id, author=options.user_name)

    submitted = launch_frozen(
        core,
        build_submission(core, frozen, options, config_name=name, job_id=job_id),
        write_environment if options.writes_environment else None,
    )
    file = core.settings.config_dir / name / "config.json" if options.writes_environment else None
    return Launched(submitted=submitted, config_name=name, config_written=file)


def launch_frozen(core: Core, submission: Submission, before_accept: Callable[[], None] | None = None) -> Submitted:
    """Raises UserError `gpus_unavailable`, with nothing written, or `in_flight`."""

    def check_claim() -> None:
        # Under the supervisor's lock: a second request with the same key must not write the file again.
        if submission.claim and core.store.claims.find(submission.claim):
            raise UserError("in_flight", "A request with this Idempotency-Key is being served.")
        if before_accept is not None:
            before_accept()

    return submit(submission, store=core.store, supervisor=core.supervisor, before_accept=check_claim)


def build_submission(
    core: Core, frozen: Frozen, options: LaunchOptions, *, config_name: str | None, job_id: str | None = None
) -> Submission:
    config = frozen.config
    return Submission(
        job_id=job_id or new_job_id(),
        config=config,
        provenance=frozen.provenance,
        datasets=frozen.datasets,
        workspace=str(core.settings.workspace),
        config_dir=str(core.settings.config_dir),
        output_dir=str(config["output_dir"]),
        num_processes=int(config.get("num_processes") or 1),
        preferred_devices=read_numbers(config.get("accelerate_visible_devices")),
        any_gpu=options.any_gpu,
        no_wait=options.no_wait,
        priority=options.priority,
        priority_override=options.priority_override,
        target=options.target,
        worker_labels=options.worker_labels,
        for_approval=options.for_approval,
        max_attempts=options.max_attempts or MOST_ATTEMPTS[options.target],
        retry_of=options.retry_of,
        peak_bytes=foresee_peak(core, frozen.config, frozen.datasets, config_name),
        config_name=config_name,
        user_id=options.user_id,
        stop_grace_s=core.settings.stop_grace_s,
        claim=options.claim,
    )


def may_write(core: Core, identity: Identity, asked: Asked) -> bool:
    """Whether the settings of a start may go into its environment, or into the one-off that it makes."""
    if asked.environment is not None:
        return may_change(core, identity, asked.environment)
    return identity.may("config.create") and identity.may("config.activate")


def check_environment(settings: ServerSettings, name: str) -> None:
    """Raises UserError when a start of environment `name` would be refused; opens nothing."""
    environments = Environments(settings.config_dir)
    known = known_options(environments.read(name).config.get("--model_family"))
    directories = Directories(settings.workspace, settings.config_dir)
    resolve([environments.layer(name, known)], directories, for_start=True).require()


def launch_environment(core: Core, name: str) -> Submitted | None:
    """Activate environment `name` and submit it, unless an unfinished job of it exists: `server --env`."""
    core.activate(name)
    unfinished = core.store.jobs.with_status([*ACTIVE, JobStatus.QUEUED, JobStatus.BLOCKED])
    if any(job.config_name == name for job in unfinished):
        return None
    asked = ask(core, OptionBody({}), name, for_start=True)
    asked.resolution.require()
    return launch(core, asked, LaunchOptions(priority=LOCAL.base_priority, user_id=LOCAL.user_id)).submitted


def _write_environment(core: Core, asked: Asked, name: str, *, owner: str | None, author: str | None) -> None:
    if asked.environment is None:
        core.environments.create(name, asked.merged({}), {"adhoc": True, "owner": owner}, None)
        core.store.settings.set(ACTIVE_ENVIRONMENT, name)
    else:
        stored = core.environments.read(name).config
        merged = asked.merged(stored)
        if merged == stored:
            return
        core.environments.write(name, merged, author=author)
    core.announce_config(name, "changed")
