"""The prompt library as a job keeps it: read from its file, pictures that its prompts edit found. training.md §7."""

from __future__ import annotations

import json
from typing import Any, cast

from simpletuner.config.directories import Directories
from simpletuner.config.prompt import images_of
from simpletuner.config.situation import error_about, warning_about
from simpletuner.errors import Problem, UserError

_OPTION = "user_prompt_library"


def settle_library(
    value: str | dict[str, Any] | None, directories: Directories, *, edits_references: bool
) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The library itself, whether it was given as a file or not, with absolute paths of its pictures."""
    try:
        library = _read(value, directories) if isinstance(value, str) else value
        located = {name: _locate(name, entry, directories) for name, entry in (library or {}).items()}
    except UserError as error:
        return None, [error_about(error.code, _OPTION, error.message, error.hint)]
    problems: list[Problem] = []
    if not edits_references and (idle := [name for name, entry in located.items() if images_of(entry)]):
        message = f"The picture of {idle[0]!r} has no effect: this flavour does not draw on references."
        problems.append(warning_about("option_no_effect", _OPTION, message))
    return (located if library is not None else None), problems


def _read(path: str, directories: Directories) -> dict[str, Any]:
    """A prompt library given as a file is frozen by content."""
    try:
        library = json.loads(directories.locate(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("bad_prompt_library", f"The prompt library {path!r} cannot be read: {error}.") from error
    if not isinstance(library, dict):
        message = f"The prompt library {path!r} holds no object."
        raise UserError("bad_prompt_library", message, hint='Write {"name": "prompt"}.')
    return cast("dict[str, Any]", library)


def _locate(name: str, entry: Any, directories: Directories) -> Any:
    images = images_of(entry)
    if not images:
        return entry
    files = [directories.locate(image) for image in images]
    for image, file in zip(images, files, strict=True):
        if not file.is_file():
            places = " and ".join(map(str, directories.candidates(image)))
            raise UserError("prompt_image_missing", f"The picture {image!r} of {name!r} is not there.", hint=places)
    return {**entry, "image": [str(file) for file in files]}
