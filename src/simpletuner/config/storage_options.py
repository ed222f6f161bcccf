"""Where the pictures of a dataset are: the keys of each `type`. training.md §3.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

StorageType = Literal["local", "aws", "huggingface", "csv"]
Filled = Annotated[str, Field(min_length=1, max_length=2000)]
Placeholder = Annotated[str, Field(pattern=r"^\{env:[A-Za-z_][A-Za-z0-9_]*\}$")]
Url = Annotated[str, Field(pattern=r"^https?://[^/@\s]+(/\S*)?$", max_length=2000)]


class StorageKeys(BaseModel):
    """The keys of all types; `KEYS_OF_TYPE` says which belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: StorageType = "local"
    """Where the files are: a folder, a bucket that speaks S3, a dataset of a Hugging Face hub, URLs in a CSV file."""

    instance_data_dir: str | None = None
    """Root folder, searched recursively, links followed."""

    aws_bucket_name: Filled | None = None
    """Bucket of AWS or of whatever speaks S3."""
    aws_data_prefix: str = ""
    """Folder in the bucket; nothing outside it is listed."""
    aws_endpoint_url: Url | None = None
    """Server, where it is not AWS."""
    aws_region_name: Filled | None = None
    """Region of the bucket."""
    aws_access_key_id: Placeholder | None = None
    """`{env:NAME}`; without it the keys of the environment or of `~/.aws` are used."""
    aws_secret_access_key: Placeholder | None = None
    """`{env:NAME}`."""
    aws_max_pool_connections: PositiveInt = 16
    """Connections to the server at once."""

    dataset_name: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$", max_length=96)] | None = None
    """`owner/name` of a dataset on the hub; the token is that of `HF_TOKEN` or of a login."""
    split: Filled = "train"
    """Part of the dataset."""
    revision: Filled | None = None
    """Branch, tag or commit; default the main branch."""
    image_column: Filled = "image"
    """Column with the pictures of a parquet dataset."""
    caption_column: Filled = "caption"
    """Column with the captions; a list cell gives several variants."""

    csv_file: Filled | None = None
    """CSV file with a header, one picture a line."""
    csv_cache_dir: str | None = None
    """Where fetched pictures are kept; default `cache/csv/<id>` beside the other caches."""
    csv_url_column: Filled = "url"
    """Column with the http or https URL of a picture."""
    csv_caption_column: Filled = "caption"
    """Column with the caption. Lines that repeat a URL give it several variants."""

    @property
    def place(self) -> str:
        """For people, and the same for the same pictures."""
        return place_of(self.model_dump())


KEYS_OF_TYPE: Mapping[str, tuple[str, ...]] = {
    "local": ("instance_data_dir",),
    "aws": (
        "aws_bucket_name", "aws_data_prefix", "aws_endpoint_url", "aws_region_name", "aws_access_key_id",
        "aws_secret_access_key", "aws_max_pool_connections",
    ),
    "huggingface": ("dataset_name", "split", "revision", "image_column", "caption_column"),
    "csv": ("csv_file", "csv_cache_dir", "csv_url_column", "csv_caption_column"),
}  # fmt: skip
"""The first key of each type must be given."""

SECRET_KEYS = ("aws_access_key_id", "aws_secret_access_key")
"""Kept as `{env:NAME}`, in the frozen job too, and filled in where the storage is opened."""


def keys_of_other_types(kind: str) -> set[str]:
    return {key for other, keys in KEYS_OF_TYPE.items() if other != kind for key in keys}


def place_of(entry: Mapping[str, Any]) -> str:
    """Of an entry whose required key is there."""
    match entry.get("type", "local"):
        case "aws":
            server = f" at {entry['aws_endpoint_url']}" if entry["aws_endpoint_url"] else ""
            return f"s3://{entry['aws_bucket_name']}/{entry['aws_data_prefix'].strip('/')}".rstrip("/") + server
        case "huggingface":
            revision = f" at {entry['revision']}" if entry["revision"] else ""
            place = f"{entry['split']!r} of the hub dataset {entry['dataset_name']}{revision}"
            return place + _column(entry, "image_column")
        case "csv":
            return str(entry["csv_file"]) + _column(entry, "csv_url_column")
        case _:
            return str(entry["instance_data_dir"])


def _column(entry: Mapping[str, Any], key: str) -> str:
    """One table may have several columns of pictures, each a dataset of its own."""
    is_usual = entry[key] == StorageKeys.model_fields[key].default
    return "" if is_usual else f", column {entry[key]!r}"
