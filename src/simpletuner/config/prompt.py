"""What validation draws: prompts by short name, sizes, seeds. training.md §7."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.config.train_config import TrainConfig
from simpletuner.config.validation_options import ValidationOptions
from simpletuner.errors import UserError

_PLAIN = re.compile(r"[^A-Za-z0-9_.-]+")
_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Prompt:
    shortname: str
    text: str
    images: tuple[str, ...] = ()
    """Files of the pictures that this prompt edits, in place of the dataset's."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of a validation: `index` counts the images of one prompt and size, `reference` the pictures to edit."""

    prompt: Prompt
    width: int
    height: int
    index: int
    seed: int
    reference: int | None = None


def plan_prompts(options: ValidationOptions) -> list[Prompt]:
    """Empty, library, `validation_prompt`. Raises UserError `prompt_clash` when two share a short name."""
    prompts: list[Prompt] = []
    if not options.validation_disable_unconditional:
        prompts.append(Prompt("unconditional", ""))
    library = options.user_prompt_library if isinstance(options.user_prompt_library, Mapping) else {}
    prompts += [Prompt(_slug(name), _text(name, value), images_of(value)) for name, value in library.items()]
    if options.validation_prompt is not None:
        prompts.append(Prompt("validation", options.validation_prompt))
    names = [prompt.shortname for prompt in prompts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            "prompt_clash",
            f"Two prompts have the short name {twice[0]!r}.",
            hint="Rename one in the prompt library.",
            pointer="/--user_prompt_library",
        )
    return prompts


def plan_pictures(config: TrainConfig, prompts: list[Prompt], num_references: int = 0) -> list[Picture]:
    """Prompts × sizes × references × images. Image i uses seed + i, whatever it is drawn on.

    `num_references` of the dataset come first; those that belong to one prompt alone follow, in the order of prompts.
    """
    options = config.validation
    seed = options.validation_seed if options.validation_seed is not None else config.run.seed
    assert seed is not None
    count = options.num_validation_images
    shared: list[int | None] = [*range(num_references)]
    own = num_references
    pictures: list[Picture] = []
    for prompt in prompts:
        references = shared or [None]
        if prompt.images and shared:
            references, own = [own], own + 1
        pictures += [
            Picture(prompt, width, height, place * count + index, seed + index, reference)
            for width, height in parse_resolutions(options.validation_resolution)
            for place, reference in enumerate(references)
            for index in range(count)
        ]
    return pictures


def parse_resolutions(value: str | float | list[str | int | float]) -> list[tuple[int, int]]:
    """`WxH`, an edge, megapixels (below 128), a comma list or a list of them → (width, height) in pixels.

    Raises UserError `bad_resolution` for what is none of these or no multiple of 16.
    """
    parts = value if isinstance(value, list) else str(value).split(",")
    if not parts:
        raise _bad_resolution("[]", "Name at least one size.")
    return [_parse_resolution(str(part).strip()) for part in parts]


def _parse_resolution(text: str) -> tuple[int, int]:
    sides = re.fullmatch(r"(\d+)x(\d+)", text)
    if sides:
        size = int(sides[1]), int(sides[2])
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        number = float(text)
        edge = int(number) if number >= 128 or _MULTIPLE <= number == int(number) else _edge_of(number)
        size = edge, edge
    else:
        raise _bad_resolution(text, "Write 1024x1024, 1024, or megapixels such as 1.0.")
    if any(side < _MULTIPLE or side % _MULTIPLE for side in size):
        raise _bad_resolution(text, f"Both sides must be multiples of {_MULTIPLE}.")
    return size


def _edge_of(megapixels: float) -> int:
    return round(math.sqrt(megapixels * 1e6) / 64) * 64


def _bad_resolution(text: str, hint: str) -> UserError:
    return UserError(
        "bad_resolution", f"{text!r} is no validation resolution.", hint=hint, pointer="/--validation_resolution"
    )


def _slug(name: str) -> str:
    return _PLAIN.sub("_", name)[:64] or "prompt"


def images_of(value: Any) -> tuple[str, ...]:
    """The pictures of a library's entry: `"image"`, one path or several."""
    image: Any = value.get("image") if isinstance(value, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return tuple(map(str, image)) if isinstance(image, list) else () if image is None else (str(image),)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _text(name: str, value: Any) -> str:
    entry: dict[str, Any] = value if isinstance(value, dict) else {"prompt": value}
    if entry.get("adapter_strength", 1) != 1:
        raise _bad_library("option_not_supported_yet", f"adapter_strength of {name!r} is not supported yet.")
    if unknown := sorted(entry.keys() - {"prompt", "image", "adapter_strength"}):
        raise _bad_library("bad_prompt_library", f"The prompt {name!r} has an unknown key {unknown[0]!r}.")
    if not isinstance(entry.get("prompt"), str):
        raise _bad_library("bad_prompt_library", f"The prompt {name!r} of the library is no text.")
    return entry["prompt"]


def _bad_library(code: str, message: str) -> UserError:
    hint = 'Write {"name": "prompt"} or {"name": {"prompt": "…", "image": "picture.png"}}.'
    return UserError(code, message, hint=hint, pointer="/--user_prompt_library")
