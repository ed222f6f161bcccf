"""Validate and start: the routes that take options (api.md §2.4)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from simpletuner.errors import Problem, UserError, errors_of, warnings_of
from simpletuner.server.asking import ask, known_options, typed_values
from simpletuner.server.audit_trail import AuditDep, audits
from simpletuner.server.config_view import mask, secret_names
from simpletuner.server.core import Core, CoreDep, IdentityDep
from simpletuner.server.deep import DeepFindings, budget_bytes
from simpletuner.server.environment_view import shown_path
from simpletuner.server.errors import ErrorItem, error_responses, request_id_of
from simpletuner.server.hooks import hook_warnings, require_hooks
from simpletuner.server.idempotency import REPLAYED_HEADER, IdempotencyKey, build_claim, find_answer
from simpletuner.server.launch import NOT_WRITTEN, Launched, LaunchOptions, launch, may_write
from simpletuner.server.negotiation import (
    message_fragment,
    problem_fragment,
    wants_html_by_default,
    wants_html_strictly,
)
from simpletuner.server.option_body import OptionBodyDep, option_body_schema
from simpletuner.server.owners import find_changeable
from simpletuner.server.rate_limit import START
from simpletuner.server.rights import limited, needs, require

router = APIRouter(prefix="/api/training", tags=["training", "configurations"])

EXAMPLE = {
    "--model_family": "pixart_sigma",
    "--model_type": "full",
    "--output_dir": "output/demo",
    "--data_backend_config": "config/multidatabackend.json",
    "--max_train_steps": 200,
}
Environment = Annotated[
    str | None, Query(max_length=80, description="Base in place of the active environment; `-` for none.")
]


class ValidateAnswer(BaseModel):
    valid: bool
    errors: list[ErrorItem]
    warnings: list[ErrorItem]
    resolved_config: dict[str, Any]
    provenance: dict[str, str]
    memory_plan: dict[str, Any] | None = None
    """Of a deep validation: predicted peak bytes of each phase, on this machine."""
    disk_plan: dict[str, Any] | None = None
    """Likewise: bytes of checkpoints and caches."""
    fit: dict[str, Any] | None = None
    """`settings` with which every phase stays inside `fit_budget_gb`, what they cost, and whether that `fits`."""


class StartAnswer(BaseModel):
    success: bool = True
    message: str
    job_id: str
    status: str
    allocated_gpus: list[int] | None
    queue_position: int | None
    config_name: str
    config_written: str | None
    warnings: list[ErrorItem]
    reason: str | None


class ConfigAnswer(BaseModel):
    message: str
    config_name: str
    etag: str
    warnings: list[ErrorItem]


def show_problems(problems: list[Problem]) -> list[ErrorItem]:
    return [ErrorItem.model_validate(problem.as_dict()) for problem in problems]


@router.post(
    "/validate",
    operation_id="validate_config",
    dependencies=[needs("config.view")],
    response_model=ValidateAnswer,
    responses={
        200: {"content": {"text/html": {}}},
        **error_responses("unknown_config", "unsupported_media_type", "not_implemented"),
    },
    openapi_extra=option_body_schema(EXAMPLE),
)
async def validate_config(
    core: CoreDep,
    identity: IdentityDep,
    request: Request,
    body: OptionBodyDep,
    environment: Environment = None,
    deep: bool = False,
    fit_budget_gb: Annotated[
        float | None, Query(gt=0, le=100_000, description="Device memory in GB (10⁹ bytes); looks as `deep` does.")
    ] = None,
) -> Response:
    """What a start would say; nothing is written. HTML unless JSON is asked for.

    `deep` looks at every file of the datasets and at the model's configuration, and predicts memory and disk: a few
    seconds more, and the scans are kept for the start. `fit_budget_gb` also proposes settings that fit.
    """
    resolution = (await run_in_threadpool(ask, core, body, environment, for_start=False)).resolution
    errors = resolution.errors
    warnings = [*resolution.warnings, *hook_warnings(identity, resolution.values)]
    found = DeepFindings([])
    if (deep or fit_budget_gb is not None) and not errors:
        found = await core.deep.look(resolution, budget_bytes(fit_budget_gb))
        errors = errors_of(found.problems)
        warnings += warnings_of(found.problems)
    status = 422 if errors else 200
    if wants_html_by_default(request.headers):
        fragment = problem_fragment(valid=not errors, errors=errors, warnings=warnings, note=found.note())
        return HTMLResponse(fragment, status)
    answer = ValidateAnswer(
        valid=not errors,
        errors=show_problems(errors),
        warnings=show_problems(warnings),
        resolved_config=mask(resolution.dashed_values(), secret_names(resolution.values.get("model_family"))),
        provenance=resolution.provenance(),
        memory_plan=found.memory_plan,
        disk_plan=found.disk_plan,
        fit=found.fit,
    ).model_dump()
    if errors:
        error = UserError.from_problems(errors)
        answer |= {"detail": error.message, "code": error.code, "request_id": request_id_of(request.scope)}
    return JSONResponse(answer, status)


@router.post(
    "/start",
    operation_id="start_training",
    dependencies=[needs("job.submit"), audits("job.start"), limited(START)],
    status_code=202,
    response_model=StartAnswer,
    responses=error_responses("unknown_config", "gpus_unavailable", "in_flight", "unsupported_media_type"),
    openapi_extra=option_body_schema(EXAMPLE),
)
def start_training(
    core: CoreDep,
    identity: IdentityDep,
    note: AuditDep,
    request: Request,
    body: OptionBodyDep,
    environment: Environment = None,
    no_wait: Annotated[bool, Query(description="Refuse rather than queue.")] = False,
    any_gpu: Annotated[bool, Query(description="Take other devices than the preferred ones.")] = False,
    priority: Annotated[int | None, Query(ge=0, le=50)] = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Start what validate calls valid, now or as soon as devices are free."""
    written = [list(pair) for pair in body.pairs] if body.is_form else body.values
    claim = build_claim(identity.user_id, idempotency_key, ["start", written, environment, no_wait, any_gpu, priority])
    html = wants_html_strictly(request.headers)
    stored = find_answer(core, claim)
    if stored is not None:
        note.nothing_done = True
        return _start_response(stored, html=html, replayed=True)
    asked = ask(core, body, environment, for_start=True)
    asked.resolution.require()
    require_hooks(identity, asked.resolution.values)
    if priority is not None and priority > identity.base_priority:
        require(identity, "job.priority.high")
    writes = may_write(core, identity, asked)
    options = LaunchOptions(
        no_wait=no_wait,
        any_gpu=any_gpu,
        priority=identity.base_priority,
        priority_override=priority,
        user_id=identity.user_id,
        user_name=identity.name,
        claim=claim,
        writes_environment=writes,
    )
    launched = launch(core, asked, options)
    note.target, note.detail = launched.submitted.job.job_id, {"environment": launched.config_name}
    warnings = asked.resolution.warnings if writes else [*asked.resolution.warnings, NOT_WRITTEN]
    answer = _start_answer(core, launched, warnings).model_dump()
    if claim is not None:
        core.store.claims.store_answer(claim, answer)
    return _start_response(answer, html=html, replayed=False)


def _start_answer(core: Core, launched: Launched, warnings: list[Problem]) -> StartAnswer:
    job, wait = launched.submitted.job, launched.submitted.wait
    file = launched.config_written
    return StartAnswer(
        message="Training started" if wait is None else "Training queued",
        job_id=job.job_id,
        status="running" if wait is None else "queued",
        allocated_gpus=None if job.devices is None else list(job.devices),
        queue_position=wait.position if wait else None,
        config_name=launched.config_name,
        config_written=None if file is None else shown_path(file, relative_to=core.settings.workspace),
        warnings=show_problems(warnings),
        reason=wait.reason if wait else None,
    )


def _start_response(answer: dict[str, Any], *, html: bool, replayed: bool) -> Response:
    headers = {REPLAYED_HEADER: "true"} if replayed else None
    if html:
        message = f"{answer['message']}: {answer['job_id']}"
        fragment = message_fragment(message, ok=True, attributes={"job-id": answer["job_id"]})
        return HTMLResponse(fragment, 202, headers=headers)
    return JSONResponse(answer, 202, headers=headers)


@router.post(
    "/config",
    operation_id="update_active_config",
    dependencies=[needs("config.edit.*"), audits("config.edit")],
    responses=error_responses("no_active_environment", "unknown_config", "unsupported_media_type"),
    openapi_extra=option_body_schema({"--learning_rate": 0.0001}, required=True),
)
def update_active_config(
    core: CoreDep, identity: IdentityDep, note: AuditDep, body: OptionBodyDep, environment: Environment = None
) -> ConfigAnswer:
    """Merge options into the active environment; nothing starts."""
    asked = environment or core.active_environment()
    if asked is None:
        raise UserError("no_active_environment", "No environment is active.", hint="Activate one first.")
    name = note.target = find_changeable(core, identity, asked)
    stored = core.environments.read(name).config
    known = known_options(body.value("model_family") or stored.get("--model_family"))
    layer = body.layer(known)
    if not layer.values and not layer.problems:
        raise UserError("body_required", "This request needs options.", hint="For example --learning_rate.")
    changes = {f"--{option}": value for option, value in typed_values(layer, known).items()}
    merged = {option: value for option, value in (stored | changes).items() if value is not None}
    require_hooks(identity, merged)
    etag = core.environments.write(name, merged, author=identity.name)
    core.announce_config(name, "changed")
    warnings = [problem for problem in layer.problems if problem.level == "warning"]
    return ConfigAnswer(message=f"{name} updated", config_name=name, etag=etag, warnings=show_problems(warnings))
