"""`simpletuner configs` about whole files: export, import, history, restore."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from simpletuner.cli.client import place
from simpletuner.cli.configs import CONFIGS, edited_lines, match_header
from simpletuner.cli.flags import NO_FLAGS, ServerFlags, Switch, columns
from simpletuner.cli.words import StoredName
from simpletuner.config.json_text import read_json
from simpletuner.errors import ExitCode, UserError

File = Literal["model", "dataloader", "lycoris"]


def export_config(
    name: StoredName,
    *,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    bare: Switch = False,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Print an environment as one JSON object, without its secrets.

    Parameters
    ----------
    name
        Environment.
    output
        Write it into this file instead.
    bare
        Only the options, without dataset file and notes.
    """
    with flags.client() as client:
        query = {"include_metadata": not bare}
        exported = client.ask("GET", place(CONFIGS, name, "export"), params=query)
    text = json.dumps(exported, indent=2, ensure_ascii=False)
    if output is None:
        return flags.show(exported, text)
    try:
        output.write_text(text + "\n")
    except OSError as error:
        message = f"{output} cannot be written: {error.strerror}."
        raise UserError("storage", message, exit_code=ExitCode.STORAGE) from error
    return flags.show(exported, f"{name} written to {output}")


def import_config(
    file: Annotated[Path, Parameter(allow_leading_hyphen=True)],
    *,
    name: str | None = None,
    overwrite: Switch = False,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Make an environment of an export, or of a config.json.

    Parameters
    ----------
    file
        Its path; `-` for stdin.
    name
        Name of the environment; that of the export without it.
    overwrite
        Replace an environment of that name.
    """
    data, _ = read_json(_read(file), name=str(file))
    body = {"data": data, "name": name, "overwrite": overwrite}
    with flags.client() as client:
        answer = client.ask("POST", f"{CONFIGS}/import", json=body)
    return flags.show(answer, *edited_lines(answer))


def show_history(name: StoredName, *, type: File = "model", diff: Switch = False, flags: ServerFlags = NO_FLAGS) -> int:
    """List the versions of an environment's file, newest first.

    Parameters
    ----------
    name
        Environment.
    type
        Its options, its dataset file or its LyCORIS configuration.
    diff
        With what each version changed.
    """
    with flags.client() as client:
        answer = client.ask("GET", place(CONFIGS, name, "history"), params={"config_type": type})
    versions = answer["versions"]
    lines = columns(_version_row(version) for version in versions)
    if diff:
        lines = [part for line, version in zip(lines, versions, strict=True) for part in (line, version["diff"])]
    return flags.show(answer, *lines)


def restore_config(
    name: StoredName,
    etag: str,
    *,
    type: File = "model",
    if_match: str | None = None,
    flags: ServerFlags = NO_FLAGS,
) -> int:
    """Bring back an earlier version of an environment's file.

    Parameters
    ----------
    name
        Environment.
    etag
        The version in `configs history`.
    type
        Its options, its dataset file or its LyCORIS configuration.
    if_match
        Only if this is the file's ETag still.
    """
    body = {"etag": etag, "config_type": type}
    with flags.client() as client:
        answer = client.ask("POST", place(CONFIGS, name, "restore"), json=body, headers=match_header(if_match))
    return flags.show(answer, *edited_lines(answer))


def _read(file: Path) -> str:
    """Raises UserError `not_found` or `bad_json`."""
    if str(file) == "-":
        return sys.stdin.read()
    try:
        return file.read_text()
    except UnicodeDecodeError as error:
        raise UserError("bad_json", f"{file} is not UTF-8 text.", pointer="/file") from error
    except OSError as error:
        raise UserError("not_found", f"{file} cannot be read: {error.strerror}.", pointer="/file") from error


def _version_row(version: dict[str, Any]) -> tuple[object, ...]:
    now = "current" if version["is_current"] else ""
    return version["etag"].strip('"'), version["modified_at"], version["author"], now
