"""Option fields of a request, as JSON, multipart or urlencoded (api.md §1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from starlette.datastructures import UploadFile

from simpletuner.config.json_text import duplicate_problems, read_json
from simpletuner.config.option import OptionField
from simpletuner.config.sources import Layer, layer_from_mapping, layer_from_pairs
from simpletuner.errors import Problem, UserError
from simpletuner.server.plain_json import check_plain

LAYER = "request"
JSON_TYPE = "application/json"
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")


@dataclass(frozen=True)
class OptionBody:
    """Either a JSON object or the pairs of a form."""

    values: Mapping[str, Any]
    pairs: tuple[tuple[str, str], ...] = ()
    problems: tuple[Problem, ...] = ()
    is_form: bool = False

    def value(self, name: str) -> Any:
        """What was written for option or field `name`; dashed first."""
        written = dict(self.pairs) if self.is_form else self.values
        return written.get(f"--{name}", written.get(name))

    def layer(self, known: Mapping[str, OptionField]) -> Layer:
        if self.is_form:
            return layer_from_pairs(self.pairs, name=LAYER, known=known)
        layer = layer_from_mapping(self.values, name=LAYER, known=known)
        return Layer(layer.name, layer.values, (*self.problems, *layer.problems))

    def only(self, *names: str) -> dict[str, Any]:
        """The fields of a body that may hold nothing but `names`. Raises UserError `unknown_field`."""
        written = dict(self.pairs) if self.is_form else dict(self.values)
        problems = [
            Problem(
                code="unknown_field",
                message=f"Unknown field {name}.",
                hint=f"Known: {', '.join(names)}.",
                pointer=f"/{name}",
            )
            for name in written
            if name not in names
        ]
        if problems:
            raise UserError.from_problems(problems, code="unknown_field")
        return written


async def read_option_body(request: Request) -> OptionBody:
    """Raises UserError `invalid_field` for what is not an object, `unsupported_media_type` for other types."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in FORM_TYPES:
        return await _read_form(request)
    content = await request.body()
    if not content.strip():
        return OptionBody({})
    if kind not in {"", JSON_TYPE} and not kind.endswith("+json"):
        hint = f"Send {JSON_TYPE}, {' or '.join(FORM_TYPES)}."
        raise UserError("unsupported_media_type", f"A body of type {kind} is not understood.", hint=hint)
    return _read_json(content)


def _read_json(content: bytes) -> OptionBody:
    try:
        value, duplicates = read_json(content.decode(), name="The body")
    except UnicodeDecodeError as error:
        raise UserError("invalid_field", "The body is not UTF-8 text.") from error
    except RecursionError as error:
        raise UserError("invalid_field", "The body is nested too deeply.") from error
    except UserError as error:
        raise UserError("invalid_field", error.message) from error
    if not isinstance(value, dict):
        raise UserError("invalid_field", "The body must be a JSON object of options.")
    try:
        check_plain(cast(object, value))
    except ValueError as error:
        raise UserError("invalid_field", f"The body {error}.") from error
    return OptionBody(cast(dict[str, Any], value), problems=tuple(duplicate_problems(duplicates, name="The body")))


async def _read_form(request: Request) -> OptionBody:
    pairs: list[tuple[str, str]] = []
    async with request.form(max_files=0, max_fields=2000) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                raise UserError("invalid_field", f"Field {name} is a file.", hint="Options are text fields.")
            pairs.append((name, value))
    return OptionBody({}, pairs=tuple(pairs), is_form=True)


OptionBodyDep = Annotated[OptionBody, Depends(read_option_body)]


async def read_job_id(body: OptionBodyDep) -> str | None:
    """Of requests whose body holds at most `job_id`."""
    job_id = body.only("job_id").get("job_id")
    return None if job_id in {None, ""} else str(job_id)


JobIdDep = Annotated[str | None, Depends(read_job_id)]


def option_body_schema(example: Mapping[str, Any], *, required: bool = False) -> dict[str, Any]:
    """For the OpenAPI document: the three forms that a body of options may take."""
    schema = {"type": "object", "additionalProperties": True}
    content = {kind: {"schema": schema, "example": dict(example)} for kind in (JSON_TYPE, *FORM_TYPES)}
    return {"requestBody": {"required": required, "content": content}}
