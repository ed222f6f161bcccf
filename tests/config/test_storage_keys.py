"""Which keys go with which `type` of a dataset. training.md §3.2."""

from __future__ import annotations

from typing import Any

import pytest
from config_place import Place, errors, only, warnings

BUCKET: dict[str, Any] = {"id": "s", "type": "aws", "aws_bucket_name": "pictures"}
HUB: dict[str, Any] = {"id": "h", "type": "huggingface", "dataset_name": "me/pictures"}
CSV: dict[str, Any] = {"id": "c", "type": "csv", "csv_file": "list.csv"}

MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"id": "s", "type": "aws"}, "aws_bucket_name", "missing_dataset_key"),
    ({"id": "h", "type": "huggingface"}, "dataset_name", "missing_dataset_key"),
    ({"id": "c", "type": "csv"}, "csv_file", "missing_dataset_key"),
    (BUCKET | {"type": "asw"}, "type", "bad_choice"),
    (BUCKET | {"instance_data_dir": "pictures"}, "instance_data_dir", "wrong_type_key"),
    (CSV | {"dataset_name": "me/pictures"}, "dataset_name", "wrong_type_key"),
    (BUCKET | {"aws_bucket_nam": "x"}, "aws_bucket_nam", "unknown_dataset_key"),
    (BUCKET | {"aws_endpoint_url": "minio:9000"}, "aws_endpoint_url", "bad_value"),
    (BUCKET | {"aws_max_pool_connections": 0}, "aws_max_pool_connections", "bad_value"),
    (BUCKET | {"aws_access_key_id": "{env:HOME}"}, "aws_access_key_id", "missing_dataset_key"),
    (BUCKET | {"aws_access_key_id": "{env:HOME}", "aws_secret_access_key": "s3cret"}, "aws_secret_access_key",
     "secret_in_file"),
    (BUCKET | {"aws_access_key_id": "{env:HOME}", "aws_secret_access_key": "{env:ST_UNSET}"}, "aws_secret_access_key",
     "env_not_set"),
    (HUB | {"dataset_name": "https://huggingface.co/datasets/me/pictures"}, "dataset_name", "bad_value"),
    (HUB | {"caption_strategy": "csv"}, "caption_strategy", "bad_choice"),
    (HUB | {"parquet": {"path": "t.parquet"}}, "parquet", "wrong_type_key"),
    (CSV | {"caption_strategy": "textfile"}, "caption_strategy", "bad_choice"),
    ({"id": "l", "instance_data_dir": "pictures", "caption_strategy": "huggingface"}, "caption_strategy",
     "bad_choice"),
    ({"id": "t", "type": "aws", "dataset_type": "text_embeds", "cache_dir": "x"}, "type", "bad_choice"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "key", "code"), MISTAKES)
def test_a_mistake_has_a_place(place: Place, entry: dict[str, Any], key: str, code: str) -> None:
    (place.workspace / "list.csv").write_text("url,caption\n")
    found = place.with_datasets([{"id": "first", "instance_data_dir": "first"}, entry])
    assert errors(found) == {f"/datasets/1/{key}": code}
    assert "s3cret" not in str(found.problems)


def test_what_is_filled_in(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions come from the column where there is one; secrets stay placeholders, in the frozen job too."""
    monkeypatch.setenv("ST_ID", "id")
    monkeypatch.setenv("ST_KEY", "s3cret")
    (place.workspace / "list.csv").write_text("url,caption\n")
    keys = {"aws_access_key_id": "{env:ST_ID}", "aws_secret_access_key": "{env:ST_KEY}"}
    found = place.with_datasets([BUCKET | keys, HUB, CSV])
    assert (errors(found), warnings(found)) == ({}, {})
    bucket, hub, table = found.require().image_datasets
    assert [row.caption_strategy for row in (bucket, hub, table)] == ["filename", "huggingface", "csv"]
    assert bucket.aws_secret_access_key == "{env:ST_KEY}" and "s3cret" not in str(found.datasets)
    assert (table.csv_file, table.csv_cache_dir) == (
        str(place.workspace / "list.csv"), str(place.workspace / "out/cache/csv/c"),
    )  # fmt: skip
    assert all("aws_bucket_name" not in row for row in found.datasets[1:])


def test_a_csv_file_that_is_not_there(place: Place) -> None:
    place.write_datasets([CSV])
    assert warnings(place.resolve()) == {"/datasets/0/csv_file": "dataset_path_missing"}
    assert errors(place.resolve(for_start=True)) == {"/datasets/0/csv_file": "dataset_path_missing"}


def test_two_columns_of_one_table_are_two_places(place: Place) -> None:
    edits = HUB | {"id": "edits", "image_column": "edited"}
    assert errors(place.with_datasets([HUB, edits])) == {}
    problem = only(place.with_datasets([HUB, HUB | {"id": "again"}]).errors)
    assert (problem.code, problem.pointer) == ("duplicate_dataset_path", "/datasets/1/dataset_name")
