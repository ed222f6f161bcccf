"""Where files are uploaded to: a Hugging Face hub, and whatever speaks S3. Runs in the process of `train.upload`."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from simpletuner.config.publish_target import HubTarget, S3Target, Target
from simpletuner.errors import ExitCode, UserError
from simpletuner.retry import Passing, Retry

Files = Mapping[str, Mapping[str, Any]]
"""Name below the folder → `size` and `sha256`."""
_PART_BYTES = 64 << 20
_BUSY = ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "Throttling", "ThrottlingException", "InternalError")


class Provider(Protocol):
    def send(self, folder: Path, files: Files, place: str, retry: Retry) -> None:
        """Upload, and compare with what has arrived. Raises UserError `upload_failed`."""
        ...


def open_provider(target: Target, *, private: bool) -> Provider:
    return Hub(target, private) if isinstance(target, HubTarget) else S3(target)


class Hub:
    """One commit an upload; large files go through LFS, which names them by their SHA-256."""

    def __init__(self, target: HubTarget, private: bool) -> None:
        from huggingface_hub import HfApi

        self._api = HfApi()
        self._repo_id = target.repo_id
        self._private = private

    def send(self, folder: Path, files: Files, place: str, retry: Retry) -> None:
        from huggingface_hub import CommitOperationAdd

        prefix = f"{place}/" if place else ""
        retry(self._create)
        commit = retry(
            # Anew each time: an operation remembers how far it came.
            lambda: self._commit([CommitOperationAdd(f"{prefix}{name}", folder / name) for name in files], place)
        )
        retry(lambda: self._compare(files, prefix, commit))

    def _create(self) -> None:
        with _hub_failures():
            self._api.create_repo(self._repo_id, private=self._private, exist_ok=True)

    def _commit(self, operations: list[Any], place: str) -> str:
        with _hub_failures():
            message = f"Upload {place or 'the result'}"
            return self._api.create_commit(self._repo_id, operations, commit_message=message).oid

    def _compare(self, files: Files, prefix: str, commit: str) -> None:
        """Sizes of all files, and the SHA-256 of those that went through LFS."""
        with _hub_failures():
            names = [f"{prefix}{name}" for name in files]
            found = {row.path: row for row in self._api.get_paths_info(self._repo_id, names, revision=commit)}
        for name, facts in files.items():
            row: Any = found.get(f"{prefix}{name}")
            if row is None or row.size != facts["size"] or (row.lfs and row.lfs.sha256 != facts["sha256"]):
                raise _failed(f"{prefix}{name} is not in {self._repo_id} as it is here.")


@contextmanager
def _hub_failures() -> Generator[None]:
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HfHubHTTPError as error:
        raise _by_status(error.response.status_code, str(error)) from error
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise _failed(str(error), hint="Set HF_TOKEN, and leave HF_HUB_OFFLINE unset.") from error
    except HTTPError as error:
        raise _passing(f"The hub cannot be reached: {error}") from error
    except (RuntimeError, ValueError) as error:  # of a file that did not get through LFS, of a card that is refused
        status = error.__cause__.response.status_code if isinstance(error.__cause__, HfHubHTTPError) else None
        reason = f"{error} {error.__cause__ or ''}".strip()
        if status is None and isinstance(error.__cause__, HTTPError):
            raise _passing(reason) from error
        raise _by_status(status or 400, reason) from error


class S3:
    """One object a file, its SHA-256 in the metadata."""

    def __init__(self, target: S3Target) -> None:
        import boto3  # pyright: ignore[reportMissingImports] - an extra
        from botocore.config import Config  # pyright: ignore[reportMissingImports]

        # Elsewhere than at AWS not every server knows the newer checksums.
        checksums = "when_supported" if target.endpoint is None else "when_required"
        config = Config(
            retries={"total_max_attempts": 1},
            request_checksum_calculation=checksums,
            response_checksum_validation="when_required",
        )
        self._target = target
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=target.endpoint,
            region_name=target.region,
            aws_access_key_id=target.access_key_id,
            aws_secret_access_key=target.secret_access_key,
            config=config,
        )

    def send(self, folder: Path, files: Files, place: str, retry: Retry) -> None:
        for name, facts in files.items():
            key = self._target.key(place, name)
            retry(lambda name=name, key=key, facts=facts: self._put(folder / name, key, facts))

    def _put(self, file: Path, key: str, facts: Mapping[str, Any]) -> None:
        from boto3.s3.transfer import TransferConfig  # pyright: ignore[reportMissingImports]

        parts = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4)
        bucket = self._target.bucket
        with _s3_failures(bucket), file.open("rb") as content:
            extra = {"Metadata": {"sha256": facts["sha256"]}}
            self._client.upload_fileobj(content, bucket, key, ExtraArgs=extra, Config=parts)
            head: Mapping[str, Any] = self._client.head_object(Bucket=bucket, Key=key)
        etag = str(head.get("ETag", "")).strip('"')
        # Under keys of its own the server's tag is not the MD5 of what was sent.
        is_md5 = head.get("ServerSideEncryption") != "aws:kms" and "SSECustomerAlgorithm" not in head
        is_same = not is_md5 or len(etag.partition("-")[0]) != 32 or etag == _etag(file)
        if head["ContentLength"] != facts["size"] or not is_same:
            raise _passing(f"{key} is not in {bucket} as it is here.")


def _etag(file: Path) -> str:
    """The MD5, or of several parts the MD5 of theirs and their number, as S3 forms it."""
    digests: list[bytes] = []
    with file.open("rb") as content:
        while part := content.read(_PART_BYTES):
            digests.append(hashlib.md5(part, usedforsecurity=False).digest())
    if file.stat().st_size < _PART_BYTES:
        return (digests[0] if digests else hashlib.md5(usedforsecurity=False).digest()).hex()
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


@contextmanager
def _s3_failures(bucket: str) -> Generator[None]:
    from botocore.exceptions import (  # pyright: ignore[reportMissingImports]
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
    )

    try:
        yield
    except ClientError as error:
        response: Mapping[str, Any] = error.response
        code, message = response["Error"].get("Code"), response["Error"].get("Message")
        reason = f"{bucket}: {code}: {message}"
        if code in _BUSY:
            raise _passing(reason) from error
        raise _by_status(response["ResponseMetadata"].get("HTTPStatusCode", 400), reason) from error
    except (ConnectionError, HTTPClientError) as error:
        raise _passing(f"{bucket}: {error}") from error
    except BotoCoreError as error:  # no keys, a bad name
        raise _failed(f"{bucket}: {error}") from error


def _by_status(status: int, reason: str) -> UserError:
    return _passing(reason) if status >= 500 or status in (408, 409, 412, 429) else _failed(reason)


def _failed(reason: str, hint: str = "") -> UserError:
    return UserError("upload_failed", reason, hint=hint, exit_code=ExitCode.OUTSIDE)


def _passing(reason: str) -> Passing:
    return Passing("upload_failed", reason, exit_code=ExitCode.OUTSIDE)
