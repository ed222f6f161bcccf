"""Puts a stored environment, or an earlier job, into the queue: for submit, its dry run and retry (api.md §2.9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from simpletuner.config.resolve import freeze, resolve
from simpletuner.config.sources import Layer, written_options
from simpletuner.errors import UserError
from simpletuner.jobs.scheduler import Start
from simpletuner.jobs.submit import GpusUnavailable, Refused, Submission, Submitted, foresee
from simpletuner.server.asking import ask, known_options
from simpletuner.server.core import Core
from simpletuner.server.hooks import require_hooks
from simpletuner.server.identity import Identity
from simpletuner.server.launch import Frozen, LaunchOptions, build_submission, launch_frozen
from simpletuner.server.option_body import OptionBody
from simpletuner.server.rights import require
from simpletuner.store.job_row import Claim, JobRow

_RESUME = "resume_from_checkpoint"
TARGETS = ("auto", "local", "worker")


class SubmitBody(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"config_name": "my-training-config"}})

    config_name: Annotated[str, Field(min_length=1, max_length=80)]
    no_wait: bool = False
    """Refuse rather than queue."""
    any_gpu: bool = False
    """Take other devices than the configured ones."""
    target: Annotated[str, Field(max_length=32)] = "auto"
    """auto, local or worker."""
    worker_labels: Annotated[dict[str, str] | None, Field(max_length=50)] = None
    """Label → glob that a worker's label must match."""
    priority: Annotated[int | None, Field(ge=0, le=50)] = None
    overrides: dict[str, Any] = {}
    """Options of this job alone; the environment stays as it is."""
    for_approval: bool = False
    max_attempts: Annotated[int | None, Field(ge=1, le=100)] = None
    idempotency_key: Annotated[str | None, Field(min_length=1, max_length=128)] = None
    dry_run: bool = False


class RetryBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    overrides: dict[str, Any] = {}
    """With any, the configuration is checked again and files that it names are read again."""
    resume: bool = True
    """Go on from the newest checkpoint in the output folder; else from the beginning."""


class SubmitAnswer(BaseModel):
    success: bool = True
    job_id: str | None
    status: str
    allocated_gpus: list[int] | None
    allocated_worker_id: str | None = None
    queue_position: int | None
    requires_approval: bool
    error: str | None = None
    reason: str | None
    dry_run: bool | None = None
    """Only of a dry run."""


class RejectedAnswer(SubmitAnswer):
    """No job was made."""

    detail: str
    code: str
    request_id: str
    hint: str | None = None


def build_from_environment(core: Core, identity: Identity, body: SubmitBody, claim: Claim | None) -> Submission:
    """Raises UserError `unknown_config`, `invalid_config`, `unsupported_target`, or what is wrong with the request."""
    _check_target(body)
    name = core.environments.folder(body.config_name).name
    asked = ask(core, OptionBody(body.overrides), name, for_start=True)
    asked.resolution.require()
    require_hooks(identity, asked.resolution.values)
    if body.dry_run:
        # To freeze writes a file, and draws a seed.
        config, provenance, datasets = asked.resolution.require().to_flat(), {}, asked.resolution.datasets
    else:
        config, provenance, datasets = freeze(asked.resolution)
    options = LaunchOptions(
        no_wait=body.no_wait,
        any_gpu=body.any_gpu,
        priority=identity.base_priority,
        priority_override=_override(identity, body.priority),
        target=body.target,
        worker_labels=body.worker_labels or None,
        for_approval=body.for_approval,
        max_attempts=body.max_attempts,
        user_id=identity.user_id,
        claim=claim,
    )
    frozen = Frozen(config=config, provenance=provenance, datasets=datasets)
    return build_submission(core, frozen, options, config_name=name)


def build_from_job(core: Core, identity: Identity, job: JobRow, body: RetryBody, claim: Claim | None) -> Submission:
    """The same again as a new job of `identity`. Raises UserError `job_not_terminal`, `invalid_config`."""
    if not job.status.is_terminal:
        raise UserError("job_not_terminal", f"Job {job.job_id} is {job.status}.", hint="Cancel it first, or wait.")
    folder = core.placement.job_dir(job.job_id)
    stored, datasets = folder.read_config(), folder.read_datasets()
    frozen = Frozen(config=stored["config"], provenance=stored["provenance"], datasets=datasets)
    if body.overrides:
        frozen = _resolve_again(core, job, stored, body.overrides)
    if OptionBody(body.overrides).value(_RESUME) is None:
        frozen.config[_RESUME] = "latest" if body.resume else None
    require_hooks(identity, frozen.config)
    options = LaunchOptions(
        any_gpu=job.any_gpu,
        priority=identity.base_priority,
        target=job.target,
        worker_labels=job.worker_labels,
        max_attempts=job.max_attempts,
        retry_of=job.job_id,
        user_id=identity.user_id,
        claim=claim,
    )
    return build_submission(core, frozen, options, config_name=job.config_name)


def enqueue(core: Core, submission: Submission) -> SubmitAnswer:
    """Raises UserError `gpus_unavailable`, `in_flight`."""
    return _show(launch_frozen(core, submission))


def predict(core: Core, submission: Submission) -> SubmitAnswer:
    """What `enqueue` would answer next; nothing is written."""
    foreseen = foresee(submission, supervisor=core.supervisor)
    if isinstance(foreseen, Refused):
        return rejected(foreseen).model_copy(update={"dry_run": True})
    starts = isinstance(foreseen, Start)
    return SubmitAnswer(
        job_id=None,
        status="running" if starts else "blocked" if submission.for_approval else "queued",
        allocated_gpus=list(foreseen.devices) if starts else None,
        allocated_worker_id=foreseen.worker_id if starts else None,
        queue_position=None if starts else foreseen.position,
        requires_approval=submission.for_approval,
        reason=None if starts else foreseen.reason,
        dry_run=True,
    )


def rejected(refused: Refused) -> SubmitAnswer:
    return SubmitAnswer(
        success=False,
        job_id=None,
        status="rejected",
        allocated_gpus=None,
        queue_position=None,
        requires_approval=False,
        error=refused.error,
        reason=refused.reason,
    )


def rejected_whole(error: GpusUnavailable, request_id: str) -> RejectedAnswer:
    """As an error too (api.md §8.6)."""
    shown = rejected(error.refused).model_dump()
    return RejectedAnswer(
        **shown, detail=error.message, code=error.code, request_id=request_id, hint=error.hint or None
    )


def _show(submitted: Submitted) -> SubmitAnswer:
    job, wait = submitted.job, submitted.wait
    return SubmitAnswer(
        job_id=job.job_id,
        status=job.status if wait else "running",
        allocated_gpus=None if job.devices is None else list(job.devices),
        allocated_worker_id=job.worker_id if wait is None else None,
        queue_position=wait.position if wait else None,
        requires_approval=job.requires_approval,
        reason=wait.reason if wait else None,
    )


def _check_target(body: SubmitBody) -> None:
    if body.target not in TARGETS:
        hint = f"One of {', '.join(TARGETS)}."
        raise UserError("unsupported_target", f"There is no target {body.target}.", hint=hint, pointer="/target")
    if body.target == "local" and body.worker_labels:
        message = "Labels choose a worker, and the target is local."
        raise UserError("invalid_field", message, hint="Leave one of them out.", pointer="/worker_labels")
    if body.for_approval and body.no_wait:
        message = "A job that needs approval waits for it, and no_wait refuses to wait."
        raise UserError("invalid_field", message, hint="Leave one of them out.", pointer="/no_wait")


def _override(identity: Identity, priority: int | None) -> int | None:
    if priority is not None and priority > identity.base_priority:
        require(identity, "job.priority.high")
    return priority


def _resolve_again(core: Core, job: JobRow, stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> Frozen:
    """What people had written, with `overrides` over it. The drawn seed stays."""
    provenance = stored["provenance"]
    given = {name: provenance[name]["value"] for name in written_options(provenance)}
    written = given | {"seed": stored["config"]["seed"]}
    body = OptionBody(overrides)
    known = known_options(body.value("model_family") or written.get("model_family"))
    base = Layer(f"environment:{job.config_name}", written)
    resolution = resolve([base, body.layer(known)], core.directories, for_start=True)
    resolution.require()
    config, provenance, datasets = freeze(resolution)
    return Frozen(config=config, provenance=provenance, datasets=datasets)
