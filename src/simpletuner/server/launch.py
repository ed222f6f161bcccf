"""Starts a checked configuration as a job: for the start route, `server --env` and the queue (api.md §2.4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

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
from simpletuner.server.settings import ServerSettings
from simpletuner.store.job_row import Claim
from simpletuner.store.settings import ACTIVE_ENVIRONMENT

NOT_WRITTEN = Problem(
    code="environment_not_written",
    message="The settings were not stored in an environment: you may not change it. The job runs with them.",
    hint="Copy the environment, activate the copy and start that.",
    level=Level.WARNING,
)


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    no_wait: bool = False
    any_gpu: bool = False
    priority: int
    user_id: str | None = None
    user_name: str | None = None
    claim: Claim | None = None
    writes_environment: bool = True


@dataclass(frozen=True, kw_only=True)
class Launched:
    submitted: Submitted
    config_name: str
    config_written: Path | None


def launch(core: Core, asked: Asked, options: LaunchOptions) -> Launched:
    """Raises UserError `invalid_config` or `gpus_unavailable`, with nothing written, or `in_flight`."""
    config, provenance, datasets = freeze(asked.resolution)
    job_id = new_job_id()
    name = asked.environment or f"{ADHOC}{job_id}"
    submission = Submission(
        job_id=job_id,
        config=config,
        provenance=provenance,
        datasets=datasets,
        workspace=str(core.settings.workspace),
        config_dir=str(core.settings.config_dir),
        output_dir=str(config["output_dir"]),
        num_processes=int(config.get("num_processes") or 1),
        preferred_devices=_preferred(config.get("accelerate_visible_devices")),
        any_gpu=options.any_gpu,
        no_wait=options.no_wait,
        priority=options.priority,
        config_name=name,
        user_id=options.user_id,
        stop_grace_s=core.settings.stop_grace_s,
        claim=options.claim,
    )

    def write_environment() -> None:
        # Under the supervisor's lock: a second request with the same key must not write the file again.
        if options.claim and core.store.claims.find(options.claim):
            raise UserError("in_flight", "A request with this Idempotency-Key is being served.")
        if options.writes_environment:
            _write_environment(core, asked, name, owner=options.user_id, author=options.user_name)

    submitted = submit(submission, store=core.store, supervisor=core.supervisor, before_accept=write_environment)
    file = core.settings.config_dir / name / "config.json" if options.writes_environment else None
    return Launched(submitted=submitted, config_name=name, config_written=file)


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


def _preferred(value: object) -> tuple[int, ...]:
    """Comma list or list of device numbers."""
    parts = cast(list[object], value) if isinstance(value, list) else str(value or "").split(",")
    return tuple(int(str(part)) for part in parts if str(part).strip().isdecimal())
