"""Environments as clients see them, and what a new one starts with (api.md §2.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from simpletuner.config.environments import Environments
from simpletuner.config.resolve import resolve
from simpletuner.errors import UserError
from simpletuner.families.registry import load_spec
from simpletuner.server.asking import ADHOC, known_options
from simpletuner.server.core import Core
from simpletuner.server.errors import ErrorItem


class Meta(BaseModel):
    name: str
    description: str | None = None
    model_family: str | None = None
    model_type: str | None = None
    model_flavour: str | None = None
    lora_type: str | None = None
    created_at: str | None = None
    modified_at: str | None = None
    owner: str | None = None
    tags: list[str] = []
    is_template: bool = False
    adhoc: bool = False
    has_dataloader: bool = False
    dataloader_path: str | None = None
    etag: str | None = None
    path: str
    error: str | None = None


class Findings(BaseModel):
    errors: list[ErrorItem]
    warnings: list[ErrorItem]
    suggestions: list[str]


def show_environment(environments: Environments, name: str, *, relative_to: Path) -> Meta:
    """A broken one is shown with its `error`."""
    notes = environments.read_metadata(name)
    dataloader = environments.dataloader_path(name)
    meta = Meta(
        name=name,
        description=notes.get("description"),
        created_at=notes.get("created_at"),
        modified_at=notes.get("modified_at"),
        owner=notes.get("owner"),
        tags=notes.get("tags") or [],
        adhoc=name.startswith(ADHOC),
        has_dataloader=dataloader.exists(),
        dataloader_path=shown_path(dataloader, relative_to=relative_to) if dataloader.exists() else None,
        path=shown_path(environments.folder(name), relative_to=relative_to),
    )
    try:
        stored = environments.read(name)
    except UserError as error:
        meta.error = error.message
        return meta
    identity = ("model_family", "model_type", "model_flavour", "lora_type")
    written = {key: stored.config.get(f"--{key}") for key in identity}
    return meta.model_copy(
        update={"etag": stored.etag, **{key: None if value is None else str(value) for key, value in written.items()}}
    )


def find_problems(core: Core, name: str) -> Findings:
    """What the environment's own configuration says to the rules; drafts may be wrong."""
    stored = core.environments.read(name)
    known = known_options(stored.config.get("--model_family"))
    resolution = resolve([core.environments.layer(name, known)], core.directories)
    return Findings(
        errors=[ErrorItem.model_validate(problem.as_dict()) for problem in resolution.errors],
        warnings=[ErrorItem.model_validate(problem.as_dict()) for problem in resolution.warnings],
        suggestions=[problem.hint for problem in resolution.problems if problem.hint],
    )


def starter_datasets(name: str, *, family: str, flavour: str | None, data_root: Path) -> list[dict[str, Any]]:
    """One image and one text_embeds entry, and references for an edit family; a person fills in where they are."""
    spec = load_spec(family)
    chosen = spec.flavours[flavour or spec.default_flavour]
    native = chosen.native_resolution
    pair = {"conditioning_data": [f"{name}-references"]} if chosen.edits_references else {}
    references = {
        "id": f"{name}-references",
        "type": "local",
        "dataset_type": "conditioning",
        "instance_data_dir": str(data_root / f"{name}-references"),
        "conditioning_type": "reference_strict",
        "cache_dir_vae": f"cache/{name}/vae-references",
    }
    return [
        {
            "id": f"{name}-images",
            "type": "local",
            "dataset_type": "image",
            "instance_data_dir": str(data_root / name),
            "caption_strategy": "textfile",
            "resolution": native,
            "resolution_type": "pixel_area",
            "cache_dir_vae": f"cache/{name}/vae",
            "crop": False,
            **pair,
        },
        *([references] if pair else []),
        {
            "id": f"{name}-text-embeds",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": f"cache/{name}/text",
        },
    ]


def shown_path(path: Path, *, relative_to: Path) -> str:
    """Relative where it lies inside."""
    return str(path.relative_to(relative_to) if path.is_relative_to(relative_to) else path)
