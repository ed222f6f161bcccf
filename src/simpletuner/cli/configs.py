"""`simpletuner configs`: the environments of a server."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from simpletuner.cli.client import place
from simpletuner.cli.flags import NO_FLAGS, ServerFlags, Switch, columns, nothing_to_set
from simpletuner.cli.words import OptionWord, StoredName, typed_options

CONFIGS = "/api/configs"
Tags = Annotated[list[str] | None, Parameter(negative="")]


def list_configs(
    *, type: Literal["model", "dataloader", "lycoris", "webhook"] = "model", flags: ServerFlags = NO_FLAGS
) -> int:
    """List environments; the active one has a star.

    Parameters
    ----------
    type
        Those that have such a file.
    """
    with flags.client() as client:
        for page in client.pages(CONFIGS, config_type=type):
            flags.show(page, *columns(_row(meta, page["active"]) for meta in page["configs"]))
    return 0


def show_config(
    name: StoredName,
    *,
    type: Literal["model", "dataloader", "lycoris"] = "model",
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Show what an environment sets, and its ETag.

    Parameters
    ----------
    name
        Environment.
    type
        Its options, its dataset file or its LyCORIS configuration.
    """
    with flags.client() as client:
        answer = client.ask("GET", place(CONFIGS, name), params={"config_type": type})
    etag = f"etag {answer['metadata']['etag']}"
    if type != "model":
        return flags.show(answer, json.dumps(answer["config"], indent=2, ensure_ascii=False))
    shown = ((option, _text(value)) for option, value in answer["config"].items())
    return flags.show(answer, f"{answer['name']}  {etag}", *(f"  {line}" for line in columns(shown)))


def create_config(
    name: str,
    *,
    model_family: str,
    model_flavour: str | None = None,
    model_type: Literal["lora", "full"] = "lora",
    lora_type: Literal["standard", "lycoris"] | None = None,
    description: str | None = None,
    tag: Tags = None,
    example: str | None = None,
    dataloader_path: str | None = None,
    no_dataloader: Switch = False,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Make an environment with a starter dataset file.

    Parameters
    ----------
    name
        Letters, digits, '.', '_' and '-'.
    model_family
        As in --model_family of a run.
    model_flavour
        The family's default without it.
    model_type
        What is trained.
    lora_type
        Of a lora: standard without it.
    description
        For people.
    tag
        May be given more than once.
    example
        One of the server's examples, as a base.
    dataloader_path
        An existing dataset file, in place of a starter.
    no_dataloader
        Without a starter dataset file.
    """
    body = {
        "name": name,
        "model_family": model_family,
        "model_flavour": model_flavour,
        "model_type": model_type,
        "lora_type": lora_type,
        "description": description,
        "tags": tag,
        "example": example,
        "dataloader_path": dataloader_path,
        "create_dataloader": not no_dataloader,
    }
    with flags.client() as client:
        answer = client.ask("POST", f"{CONFIGS}/environments", json=body)
    dataloader = answer["dataloader"]
    return flags.show(answer, answer["message"], *([f"  {dataloader['absolute_path']}"] if dataloader else []))


def set_options(
    name: StoredName,
    *words: OptionWord,
    description: str | None = None,
    tag: Tags = None,
    if_match: str | None = None,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Change options of an environment: simpletuner configs set NAME key=value …; `key=` unsets one.

    Parameters
    ----------
    name
        Environment.
    words
        key=value.
    description
        For people.
    tag
        In place of its tags; may be given more than once.
    if_match
        Only if this is its ETag still.
    """
    options = typed_options(words)
    body: dict[str, Any] = {"config": options, "description": description, "tags": tag}
    if not options and description is None and tag is None:
        raise nothing_to_set("Write key=value.")
    with flags.client() as client:
        answer = client.ask("PATCH", place(CONFIGS, name), json=body, headers=match_header(if_match))
    return flags.show(answer, *edited_lines(answer))


def activate_config(name: StoredName, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Make an environment the active one.

    Parameters
    ----------
    name
        Environment.
    """
    return _post(place(CONFIGS, name, "activate"), None, flags)


def deactivate_config(name: StoredName, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Have an environment no longer be the active one.

    Parameters
    ----------
    name
        Environment.
    """
    return _post(place(CONFIGS, name, "deactivate"), None, flags)


def copy_config(name: StoredName, target: str, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Copy an environment.

    Parameters
    ----------
    name
        Environment.
    target
        Name of the copy.
    """
    return _post(place(CONFIGS, name, "copy"), {"target_name": target}, flags)


def rename_config(name: StoredName, target: str, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Rename an environment; paths inside that begin with the old name follow.

    Parameters
    ----------
    name
        Environment.
    target
        New name.
    """
    return _post(place(CONFIGS, name, "rename"), {"new_name": target}, flags)


def delete_config(name: StoredName, *, flags: ServerFlags = NO_FLAGS) -> int:
    """Move an environment into the trash folder.

    Parameters
    ----------
    name
        Environment.
    """
    with flags.client() as client:
        answer = client.ask("DELETE", place(CONFIGS, name))
    return flags.show(answer, answer["message"])


def match_header(etag: str | None) -> dict[str, str]:
    """`etag` with or without its quotes, which a shell eats easily."""
    if etag is None:
        return {}
    return {"If-Match": etag if etag == "*" or etag.startswith('"') else f'"{etag}"'}


def edited_lines(answer: dict[str, Any]) -> list[str]:
    """What was done, and what the rules say about the result, which is stored all the same."""
    found = answer["validation"]
    problems = [("error", item) for item in found["errors"]] + [("warning", item) for item in found["warnings"]]
    return [answer["message"], *(problem_line(level, item) for level, item in problems)]


def problem_line(level: str, item: dict[str, Any]) -> str:
    hint = f" {item['hint']}" if item["hint"] else ""
    return f"  {level}: {item['pointer'] or '/'}  {item['code']}: {item['message']}{hint}"


def _post(path: str, body: dict[str, str] | None, flags: ServerFlags) -> int:
    with flags.client() as client:
        answer = client.ask("POST", path, json=body)
    return flags.show(answer, answer["message"])


def _row(meta: dict[str, Any], active: str | None) -> tuple[object, ...]:
    star = "*" if meta["name"] == active else " "
    return star, meta["name"], meta["model_family"], meta["model_type"], meta["error"] or meta["description"] or ""


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
