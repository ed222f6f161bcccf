"""Pictures in a bucket of AWS, or of whatever speaks S3. training.md §3.2."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import IO, Any, TypeVar

from simpletuner.config.dataset_options import PictureDataset
from simpletuner.config.directories import expand_placeholders
from simpletuner.data.ranged import RangedFile
from simpletuner.data.storage import FileStat
from simpletuner.errors import ExitCode, UserError
from simpletuner.retry import Passing, Retry

_CONNECT_S = 10.0
_READ_S = 60.0
_BUSY = ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "ThrottlingException", "InternalError")
_DENIED = (401, 403)
_LOST = ("NoSuchKey", "PreconditionFailed", "InvalidRange")
T = TypeVar("T")


class S3Backend:
    """The objects under a prefix. Parts with a leading dot are hidden, as files are; folder markers are no files."""

    def __init__(self, dataset: PictureDataset, retry: Retry | None = None) -> None:
        """Raises UserError `env_not_set` where a key's variable is not set."""
        assert dataset.aws_bucket_name is not None
        self._id = dataset.id
        self._bucket = dataset.aws_bucket_name
        prefix = dataset.aws_data_prefix.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._place = dataset.place
        self._retry = retry or Retry()
        self._client = _connect(dataset)
        self._stat: dict[str, FileStat] = {}

    @property
    def identity(self) -> str:
        return self._place

    @property
    def revision(self) -> None:
        return None

    def list(self) -> list[FileStat]:
        found: dict[str, FileStat] = {}
        token: str | None = None
        while True:
            page = self._ask(partial(self._list_page, token), f"its listing of {self._prefix!r}")
            for row in page.get("Contents", ()):
                path = str(row["Key"])[len(self._prefix) :]
                if path and not path.endswith("/") and not any(part.startswith(".") for part in path.split("/")):
                    mtime_ns = int(row["LastModified"].timestamp()) * 10**9
                    found[path] = FileStat(path, int(row["Size"]), mtime_ns, str(row["ETag"]).strip('"'))
            token = page.get("NextContinuationToken")
            if token is None:
                break
        self._stat = found
        return sorted(found.values(), key=lambda file: file.path.encode(errors="surrogateescape"))

    def open(self, path: str) -> IO[bytes]:
        """Parts of the very object that was listed: one that has been replaced since is an OSError."""
        stat = self._found(path)
        return io.BufferedReader(RangedFile(stat.num_bytes, lambda start, length: self._get(stat, start, length)))

    def read(self, path: str) -> bytes:
        stat = self._found(path)
        return self._get(stat, 0, stat.num_bytes) if stat.num_bytes else b""

    def captions(self, path: str) -> tuple[str, ...]:
        return ()

    def _found(self, path: str) -> FileStat:
        if path not in self._stat:
            raise FileNotFoundError(f"there is no {path} in {self._place}")
        return self._stat[path]

    def _list_page(self, token: str | None) -> Mapping[str, Any]:
        more = {} if token is None else {"ContinuationToken": token}
        return self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, **more)

    def _get(self, stat: FileStat, start: int, length: int) -> bytes:
        key = self._prefix + stat.path
        part = f"bytes={start}-{start + length - 1}"

        def get() -> bytes:
            answer = self._client.get_object(Bucket=self._bucket, Key=key, Range=part, IfMatch=f'"{stat.version}"')
            return answer["Body"].read()

        content = self._ask(get, key)
        if len(content) != length:
            raise OSError(f"{key} was changed after it was listed")
        return content

    def _ask(self, act: Callable[[], T], what: str) -> T:
        def once() -> T:
            with self._failures(what):
                return act()

        return self._retry(once)

    @contextmanager
    def _failures(self, what: str) -> Generator[None]:
        from botocore.exceptions import (  # pyright: ignore[reportMissingImports] - an extra
            BotoCoreError,
            ClientError,
            ConnectionError,
            HTTPClientError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        try:
            yield
        except ClientError as error:
            self._explain(error.response, what, error)
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise self._denied(what, "no access key is given") from error
        except (ConnectionError, HTTPClientError) as error:
            raise self._unavailable(what, str(error)) from error
        except BotoCoreError as error:  # a bad name, an answer that is none of S3's
            raise UserError(
                "storage_unavailable",
                f"Dataset {self._id!r}: the server does not answer as S3 does for {what} in {self._bucket}: {error}",
                hint="Correct `aws_endpoint_url`, `aws_bucket_name` and `aws_region_name`.",
                pointer="/aws_endpoint_url",
                exit_code=ExitCode.OUTSIDE,
            ) from error

    def _explain(self, answer: Mapping[str, Any], what: str, error: Exception) -> None:
        code, words = str(answer["Error"].get("Code")), str(answer["Error"].get("Message"))
        status = int(answer["ResponseMetadata"].get("HTTPStatusCode", 400))
        if code in _BUSY or status >= 500 or status == 429:
            raise self._unavailable(what, f"{code}: {words}") from error
        if code in _LOST or status == 412:
            raise OSError(f"{what} was changed or removed after it was listed") from error
        if status in _DENIED:
            raise self._denied(what, f"{code}: {words}") from error
        key = "aws_bucket_name" if code == "NoSuchBucket" or status == 404 else "aws_region_name"
        raise UserError(
            "storage_missing",
            f"Dataset {self._id!r}: the bucket {self._bucket} cannot be read: {code}: {words}",
            hint=f"Correct `{key}`; the server is that of `aws_endpoint_url`, by default AWS.",
            pointer=f"/{key}",
            exit_code=ExitCode.DATA,
        ) from error

    def _denied(self, what: str, reason: str) -> UserError:
        return UserError(
            "storage_denied",
            f"Dataset {self._id!r}: {what} in the bucket {self._bucket} may not be read: {reason}",
            hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the keys `aws_access_key_id` and "
            "`aws_secret_access_key` to {env:NAME}; the account needs s3:ListBucket and s3:GetObject.",
            pointer="/aws_access_key_id",
            exit_code=ExitCode.OUTSIDE,
        )

    def _unavailable(self, what: str, reason: str) -> Passing:
        return Passing(
            "storage_unavailable",
            f"Dataset {self._id!r}: {what} in the bucket {self._bucket} cannot be had: {reason}",
            hint="Look after the network and `aws_endpoint_url`; several attempts have failed.",
            pointer="/aws_endpoint_url",
            exit_code=ExitCode.OUTSIDE,
        )


def _connect(dataset: PictureDataset) -> Any:
    import boto3  # pyright: ignore[reportMissingImports] - an extra
    from botocore.config import Config  # pyright: ignore[reportMissingImports]

    written = {"aws_access_key_id": dataset.aws_access_key_id, "aws_secret_access_key": dataset.aws_secret_access_key}
    keys, missing = expand_placeholders({name: value for name, value in written.items() if value is not None})
    if missing:
        raise UserError("env_not_set", f"Dataset {dataset.id!r}: the variable {missing[0]} is not set.")
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        max_pool_connections=dataset.aws_max_pool_connections,
        retries={"total_max_attempts": 1},  # `Retry` tries again: also what breaks off in the middle of a body
        response_checksum_validation="when_required",
    )
    return boto3.client(
        "s3",
        endpoint_url=dataset.aws_endpoint_url,
        region_name=dataset.aws_region_name,
        config=config,
        **keys,
    )
