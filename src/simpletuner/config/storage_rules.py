"""What goes with which `type` of a dataset, and what can be seen of a storage without asking it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simpletuner.config.folder_look import look_into, missing_folder_hint
from simpletuner.config.storage_options import KEYS_OF_TYPE, SECRET_KEYS
from simpletuner.errors import Level, Problem

_OWN_STRATEGY = ("csv", "huggingface")
"""Types whose captions stand in a column; the `caption_strategy` has the name of the type."""


def check_keys(written: Mapping[str, Any], pointer: str) -> Iterator[Problem]:
    """Of an entry with pictures, as a person wrote it: keys of another type, a missing one, secrets in the file."""
    kind = str(written.get("type") or "local")
    for other, keys in KEYS_OF_TYPE.items():
        for key in keys if other != kind else ():
            if written.get(key) not in (None, ""):
                hint = f'Write "type": "{other}", or remove it.'
                message = f"{key!r} belongs to the type {other!r}, and this dataset is of type {kind!r}."
                yield Problem(code="wrong_type_key", message=message, hint=hint, pointer=f"{pointer}/{key}")
    needed = KEYS_OF_TYPE[kind][0]
    if written.get(needed) in (None, ""):
        message = f"{needed!r} is missing."
        yield Problem(code="missing_dataset_key", message=message, pointer=f"{pointer}/{needed}")
    if kind == "aws":
        yield from _check_secrets(written, pointer)


def _check_secrets(written: Mapping[str, Any], pointer: str) -> Iterator[Problem]:
    given = [key for key in SECRET_KEYS if written.get(key)]
    if len(given) == 1:
        message = "aws_access_key_id and aws_secret_access_key go together."
        yield Problem(code="missing_dataset_key", message=message, pointer=f"{pointer}/{given[0]}")
    for key in given:
        text = str(written[key])
        if not (text.startswith("{env:") and text.endswith("}")):
            yield Problem(
                code="secret_in_file",
                message=f"{key!r} holds a key itself, which everyone may read who sees the dataset file.",
                hint="Put it into a variable and write {env:NAME}, or leave it out: AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY are read as well.",
                pointer=f"{pointer}/{key}",
            )


def default_strategy(kind: str) -> str | None:
    """The `caption_strategy` of an entry that names none; None: that of the option."""
    return kind if kind in _OWN_STRATEGY else None


def look_at_storage(entry: Mapping[str, Any], pointer: str, level: Level) -> Iterator[Problem]:
    """`level`: of what may still come to be before a run starts."""
    kind = entry["type"]
    if kind == "local":
        yield from _look_at_folder(entry, pointer, level)
    if kind == "csv" and not Path(entry["csv_file"]).is_file():
        message = f"The CSV file {entry['csv_file']} of dataset {entry['id']!r} does not exist here."
        hint = "A relative path starts at the workspace."
        yield Problem(
            code="dataset_path_missing", message=message, hint=hint, pointer=f"{pointer}/csv_file", level=level
        )
    if kind == "aws" and find_spec("boto3") is None:
        message = "Pictures in a bucket need the package boto3, which is not installed."
        hint = 'pip install "simpletuner[s3]"'
        yield Problem(code="storage_unavailable", message=message, hint=hint, pointer=f"{pointer}/type")
    yield from _look_at_captions(entry, kind, pointer)


def _look_at_folder(entry: Mapping[str, Any], pointer: str, level: Level) -> Iterator[Problem]:
    root = entry["instance_data_dir"]
    if Path(root).is_dir():
        yield from look_into(entry, pointer)
        return
    message = f"The folder {root} of dataset {entry['id']!r} does not exist here."
    yield Problem(
        code="dataset_path_missing",
        message=message,
        hint=missing_folder_hint(root),
        pointer=f"{pointer}/instance_data_dir",
        level=level,
    )


def _look_at_captions(entry: Mapping[str, Any], kind: str, pointer: str) -> Iterator[Problem]:
    strategy = entry["caption_strategy"]
    if strategy in _OWN_STRATEGY and strategy != kind:
        message = f"caption_strategy {strategy!r} takes captions from the column of a dataset of that type."
        hint = f"This one is of type {kind!r}: choose another strategy."
        yield Problem(code="bad_choice", message=message, hint=hint, pointer=f"{pointer}/caption_strategy")
    if kind == "csv" and strategy == "textfile":
        message = "Pictures from a CSV file have no caption files beside them."
        yield Problem(
            code="bad_choice", message=message, hint="Use the strategy csv.", pointer=f"{pointer}/caption_strategy"
        )
    if kind in _OWN_STRATEGY and (entry["parquet"] or entry["metadata_backend"] == "parquet"):
        message = f"A table of captions and sizes lies beside pictures of type local or aws, not of type {kind}."
        hint = f"Captions of this type come from a column: caption_strategy {kind}."
        yield Problem(code="wrong_type_key", message=message, hint=hint, pointer=f"{pointer}/parquet")
