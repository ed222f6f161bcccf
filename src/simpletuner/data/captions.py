"""Captions: where they come from, and which one a visit uses. training.md §3.5. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from simpletuner.config.dataset_options import PictureDataset
from simpletuner.data.geometry import DropReason
from simpletuner.data.keys import below, u
from simpletuner.data.storage import split_extension, stem_of
from simpletuner.errors import UserError

Variants = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CaptionDefect:
    reason: DropReason
    detail: str
    """What is wrong and how it is mended, naming the file."""


class VisitCaption(NamedTuple):
    """What one visit says to the text encoder."""

    variant: int
    is_dropped: bool


def choose_caption(num_variants: int, dropout: float, *, seed: int, sample: str, visit: int) -> VisitCaption:
    """The variant of a visit, and whether the empty caption takes its place. `sample` = `<dataset id>/<path>`."""
    variant = below(num_variants, "caption", seed, sample, visit) if num_variants > 1 else 0
    is_dropped = dropout > 0 and u("dropout", seed, sample, visit) < dropout
    return VisitCaption(variant, is_dropped)


def sample_name(dataset_id: str, path: str) -> str:
    """The name that every counter stream of a sample is keyed by."""
    return f"{dataset_id}/{path}"


class Captions:
    """The effective captions of a dataset's pictures. One method; the strategy is chosen at the start."""

    def __init__(
        self,
        dataset: PictureDataset,
        *,
        names: Collection[str],
        read_text: Callable[[str], bytes],
        column: Callable[[str], Variants],
    ) -> None:
        """`names`: all files of the dataset, to look for captions in; `read_text`: a file's bytes; `column`: what the
        table beside the pictures, or that of their storage, says of a picture.

        Raises UserError `instance_prompt_missing` where the prompt that the options ask for is not given.
        """
        self._dataset = dataset
        self._names = names
        self._read_text = read_text
        self._column = column
        self._prompts = _instance_prompts(dataset)
        self._strategy = effective_strategy(dataset)

    def of(self, path: str) -> Variants | CaptionDefect:
        """The effective captions of one picture, at least one."""
        if self._strategy == "instanceprompt":
            return self._prompts
        found = self._own(path)
        if isinstance(found, CaptionDefect) or not self._dataset.prepend_instance_prompt:
            return found
        return tuple(f"{prompt} {caption}" for prompt in self._prompts for caption in found)

    def _own(self, path: str) -> Variants | CaptionDefect:
        if self._strategy == "source":
            return ("",)
        if self._strategy == "filename":
            return (stem_of(path).replace("_", " "),)
        if self._strategy == "textfile":
            return self._text(path)
        return self._column(path) or CaptionDefect(DropReason.CAPTION_MISSING, f"{path} has no caption in the table")

    def _text(self, path: str) -> Variants | CaptionDefect:
        name = text_name(path)
        if name not in self._names:
            other = split_extension(path)[0] + ".caption"
            hint = f"; rename {other} to {name}" if other in self._names else ""
            return CaptionDefect(DropReason.CAPTION_MISSING, f"{path} has no caption file {name}{hint}")
        try:
            text = self._read_text(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return CaptionDefect(
                DropReason.CAPTION_UNREADABLE, f"{name} is not UTF-8 (byte {error.start}); save it as UTF-8"
            )
        except OSError as error:
            return CaptionDefect(DropReason.CAPTION_UNREADABLE, f"{name} cannot be read: {error.strerror}")
        whole = [text] if self._dataset.disable_multiline_split else text.splitlines()
        variants = tuple(line.strip() for line in whole if line.strip())
        return variants or CaptionDefect(DropReason.CAPTION_MISSING, f"{name} is empty")


def effective_strategy(dataset: PictureDataset) -> str:
    """The strategy that acts: with `only_instance_prompt` no caption of the picture's own is looked for."""
    if dataset.only_instance_prompt or dataset.caption_strategy == "instance_prompt":
        return "instanceprompt"
    return dataset.caption_strategy or "source"


def caption_source(dataset: PictureDataset, path: str) -> str:
    """What the ledger calls the origin of a picture's caption: a file, or the strategy."""
    strategy = effective_strategy(dataset)
    if strategy == "textfile":
        return text_name(path)
    if strategy == "parquet" and dataset.parquet is not None:
        return dataset.parquet.path
    return "instance_prompt" if strategy == "instanceprompt" else strategy


def text_name(path: str) -> str:
    """The caption file of a picture: same folder, same stem."""
    return split_extension(path)[0] + ".txt"


def _instance_prompts(dataset: PictureDataset) -> Variants:
    prompt = dataset.instance_prompt
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt or ())
    is_needed = (
        dataset.only_instance_prompt
        or dataset.prepend_instance_prompt
        or dataset.caption_strategy in ("instanceprompt", "instance_prompt")
    )
    if is_needed and not prompts:
        raise UserError(
            "instance_prompt_missing",
            f"Dataset {dataset.id!r} takes captions from `instance_prompt`, but none is given.",
            hint="Set `instance_prompt`, or choose another `caption_strategy`.",
        )
    return prompts
