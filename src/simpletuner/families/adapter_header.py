"""What an adapter file says of itself: the header of a safetensors file, which is read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from simpletuner.errors import ExitCode, UserError

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "flux": ("flux-1", "flux.1", "flux1"),
    "pixart_sigma": ("pixart-sigma", "pixart_sigma"),
}
"""Family → how the header's `modelspec.architecture` begins in files for it, in lower case."""

_OBJECT = TypeAdapter(dict[str, Any])
_TEXTS = TypeAdapter(dict[str, str])


@dataclass(frozen=True, slots=True)
class AdapterHeader:
    keys: tuple[str, ...]
    metadata: Mapping[str, str]

    @property
    def lora_type(self) -> str | None:
        """`--lora_type` of a run that could have written these keys; None for another tool's spelling."""
        if any(key.startswith("lycoris_") for key in self.keys):
            return "lycoris"
        return "standard" if any(key.endswith(".lora_A.weight") for key in self.keys) else None


def family_of_header(metadata: Mapping[str, str]) -> str | None:
    """The family a file's header states: our own key first, then `modelspec.architecture`; None if it is silent.

    An architecture that no family here goes by is given back as it is, so that it is told apart from silence.
    """
    if own := metadata.get("simpletuner_family"):
        return own
    architecture = metadata.get("modelspec.architecture", "").lower()
    for family, spellings in ARCHITECTURES.items():
        if architecture.startswith(spellings):
            return family
    return architecture.partition("/")[0] or None


def read_header(path: Path) -> AdapterHeader:
    """Raises UserError `adapter_unreadable`. The file: 8 bytes of length, that much JSON, the tensors."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("the length is none")
            rows = _OBJECT.validate_json(file.read(length))
        metadata = _TEXTS.validate_python(rows.pop("__metadata__", {}))
        return AdapterHeader(tuple(rows), metadata)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no safetensors file"
        raise UserError(
            "adapter_unreadable",
            f"The adapter file {path} cannot be read: {reason}.",
            hint="Adapters are read from .safetensors files only.",
            exit_code=ExitCode.DATA,
        ) from error
