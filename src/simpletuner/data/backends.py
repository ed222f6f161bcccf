"""The storage of a dataset, by its `type`."""

from __future__ import annotations

from pathlib import Path

from simpletuner.config.dataset_options import PictureDataset
from simpletuner.data.storage import DataBackend, LocalBackend


def open_backend(dataset: PictureDataset, cache_dir: Path) -> DataBackend:
    """`cache_dir` keeps what a storage need not be asked twice. Nothing is asked before `list`."""
    match dataset.type:
        case "aws":
            # Each storage has a library of its own that the others need not have.
            from simpletuner.data.storage_s3 import S3Backend

            return S3Backend(dataset)
        case "huggingface":
            from simpletuner.data.storage_hub import HubBackend

            return HubBackend(dataset, cache_dir)
        case "csv":
            from simpletuner.data.storage_csv import CsvBackend

            return CsvBackend(dataset)
        case "local":
            assert dataset.instance_data_dir is not None
            return LocalBackend(Path(dataset.instance_data_dir))
