"""Where results are uploaded to: `push_to_hub` and the entries of `publishing_config`. training.md §7.4."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from simpletuner.config.directories import Directories, expand_placeholders
from simpletuner.config.json_text import read_json
from simpletuner.errors import Problem, UserError

OPTION = "publishing_config"
PROVIDERS = ("hub", "s3", "backblaze_b2")
PROVIDERS_LATER = ("azure_blob", "dropbox")
REPOSITORY = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"
_HINT = 'Write {"provider": "s3", "bucket": "…"}, or a list of such objects.'

Text = Annotated[str, Field(min_length=1, max_length=2000)]
Url = Annotated[str, Field(pattern=r"^https?://[^/@\s]+(/\S*)?$", max_length=2000)]


class _Target(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoints: bool = True
    """Each checkpoint too, or only the result at the end."""


class HubTarget(_Target):
    """A model repository of a Hugging Face hub; the token is that of `HF_TOKEN` or of a login."""

    provider: Literal["hub"] = "hub"
    repo_id: Annotated[str, Field(pattern=REPOSITORY, max_length=96)]

    def url(self, place: str) -> str:
        """Where people find what is uploaded to `place`; the empty one is the top."""
        hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        return f"{hub}/{self.repo_id}" + (f"/tree/main/{place}" if place else "")


class S3Target(_Target):
    """A bucket of whatever speaks S3. Without keys those of the environment or of `~/.aws` are used."""

    provider: Literal["s3", "backblaze_b2"]
    bucket: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]+$", max_length=255)]
    prefix: str = Field(default="", max_length=900)
    """Before every name in the bucket; by default the name of the output folder."""
    endpoint_url: Url | None = None
    region: Text | None = None
    access_key_id: Text | None = None
    secret_access_key: Text | None = None
    public_url: Url | None = None
    """Where the bucket's root is read over HTTP: what `{remote_checkpoint_path}` then begins with."""

    @model_validator(mode="after")
    def _check(self) -> S3Target:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise PydanticCustomError("half_a_key", "access_key_id and secret_access_key go together")
        if self.provider == "backblaze_b2" and self.endpoint is None:
            raise PydanticCustomError("no_endpoint", "backblaze_b2 needs region or endpoint_url")
        return self

    @property
    def endpoint(self) -> str | None:
        """None: that of AWS."""
        if self.provider == "backblaze_b2" and self.endpoint_url is None and self.region is not None:
            return f"https://s3.{self.region}.backblazeb2.com"
        return self.endpoint_url

    def key(self, *parts: str) -> str:
        return "/".join(part for part in (self.prefix, *parts) if part)

    def url(self, place: str) -> str:
        """Where people find what is uploaded to `place`; the empty one is the top."""
        base = (self.public_url or f"s3://{self.bucket}").rstrip("/")
        return "/".join(part for part in (base, self.key(place)) if part)


Target = HubTarget | S3Target
_MODELS: Mapping[str, type[HubTarget] | type[S3Target]] = {"hub": HubTarget, "s3": S3Target, "backblaze_b2": S3Target}


def read_targets(value: Any, directories: Directories, *, prefix: str) -> tuple[list[Target], list[Problem]]:
    """The targets of `publishing_config` that are right, and what is wrong with the others.

    `value`: an object, a list, or the path of a JSON file with either. `prefix`: of a bucket where none is given.
    """
    pointer = f"/--{OPTION}"
    found: list[Target] = []
    problems: list[Problem] = []
    if isinstance(value, str):
        try:
            value, missing = expand_placeholders(_read_file(value, directories))
        except UserError as error:
            return [], [_problem(error.message, error.hint, pointer, code=error.code)]
        hint = "Set it before the job is started."
        problems += [
            _problem(f"The variable {name} is not set.", hint, pointer, code="env_not_set") for name in missing
        ]
    for number, row in enumerate(cast(list[Any], value) if isinstance(value, list) else [value]):
        place = f"{pointer}/{number}" if isinstance(value, list) else pointer
        target = _parse(row, place, prefix)
        if isinstance(target, list):
            problems += target
        else:
            found.append(target)
    return found, problems


def frozen_targets(config: Mapping[str, Any]) -> list[Target]:
    """Of a configuration that was checked, by bare names: every place, the hub of `push_to_hub` first."""
    targets: list[Target] = [_MODELS[row["provider"]].model_validate(row) for row in config[OPTION] or ()]
    if config["push_to_hub"]:
        targets.insert(0, HubTarget(repo_id=config["hub_model_id"], checkpoints=config["push_checkpoints_to_hub"]))
    return targets


def _parse(row: Any, place: str, prefix: str) -> Target | list[Problem]:
    if not isinstance(row, dict):
        return [_problem("A place to publish to is an object.", _HINT, place)]
    values = cast(dict[str, Any], row)
    provider = str(values.get("provider"))
    known = ", ".join(PROVIDERS)
    if provider in PROVIDERS_LATER:
        message = f"Publishing to {provider} is not supported yet."
        return [_problem(message, f"Use one of {known}.", f"{place}/provider", code="option_not_supported_yet")]
    if provider not in _MODELS:
        near = get_close_matches(provider, PROVIDERS, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        message = f"There is no provider {provider!r}." if "provider" in values else "provider is missing."
        return [_problem(message, f"{guess}Known: {known}.", f"{place}/provider")]
    try:
        target = _MODELS[provider].model_validate(values)
    except ValidationError as error:
        return list(_explain(error, _MODELS[provider], place))
    if isinstance(target, S3Target):
        return target.model_copy(update={"prefix": target.prefix.strip("/") or prefix})
    return target


def _explain(error: ValidationError, model: type[BaseModel], place: str) -> Iterator[Problem]:
    known = list(model.model_fields)
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        pointer = f"{place}/{name}" if name else place
        if item["type"] == "extra_forbidden":
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            yield _problem(f"A place to publish to has no field {name!r}.", hint, pointer, code="unknown_field")
        elif item["type"] == "missing":
            yield _problem(f"{name} is missing.", _HINT, pointer)
        else:
            yield _problem(f"{name}: {item['msg']}.".removeprefix(": "), "", pointer)


def _read_file(path: str, directories: Directories) -> Any:
    file: Path = directories.locate(path)
    try:
        return read_json(file.read_text(encoding="utf-8"), name=path)[0]
    except (OSError, ValueError) as error:
        places = " or ".join(str(place) for place in directories.candidates(path))
        hint = f"Give JSON text, or a JSON file at {places}."
        raise UserError("bad_publishing", f"The publishing file {path!r} cannot be read.", hint=hint) from error


def _problem(message: str, hint: str, pointer: str, *, code: str = "bad_publishing") -> Problem:
    return Problem(code=code, option=OPTION, message=message, hint=hint, pointer=pointer)
