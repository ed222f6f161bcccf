"""Which LyCORIS configuration a run uses: a file, or one that follows the options. training.md §4.6. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from simpletuner.config.directories import Directories
from simpletuner.config.lycoris import FILE, POINTER, generated_text, is_unedited, read_lycoris_config
from simpletuner.config.model_options import AdapterOptions
from simpletuner.errors import UserError


@dataclass(frozen=True, slots=True)
class LycorisSource:
    """`config` is frozen into the job; `file` is where it is to be written down, if we made it."""

    config: dict[str, Any]
    file: Path | None = None


def find_lycoris_config(
    values: Mapping[str, Any], layer_names: Sequence[str], directories: Directories
) -> LycorisSource | None:
    """None where the run has no LyCORIS adapter.

    A file that we wrote and nobody edited follows rank, alpha and dropout. Raises UserError for one that is unreadable.
    """
    if values.get("model_type") != "lora" or values.get("lora_type") != "lycoris":
        return None
    options = AdapterOptions(**{name: values[name] for name in ("lora_rank", "lora_alpha", "lora_dropout")})
    made: dict[str, Any] = json.loads(generated_text(options))
    given = values.get("lycoris_config")
    if isinstance(given, dict):
        return LycorisSource(cast(dict[str, Any], given))
    if isinstance(given, str) and given.lstrip().startswith("{"):
        return LycorisSource(_from_text(given))
    file = directories.locate(given) if given else _beside(layer_names, directories)
    if given is None and (file is None or not file.exists()):
        return LycorisSource(made, file)
    assert file is not None
    found = read_lycoris_config(file, given or file.name)
    return LycorisSource(made, file) if is_unedited(found) else LycorisSource(found)


def _beside(layer_names: Sequence[str], directories: Directories) -> Path | None:
    """The file of the environment that the run comes from."""
    names = [name.partition(":")[2] for name in layer_names if name.startswith("environment:")]
    return directories.config / names[-1] / FILE if names else None


def _from_text(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError("bad_lycoris_config", f"It is no JSON: {error}.", pointer=POINTER) from error
    return cast(dict[str, Any], value)
