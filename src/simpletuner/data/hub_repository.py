"""The files of a dataset on a Hugging Face hub: listed at one commit, fetched into the hub's own cache."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from simpletuner.config.dataset_options import PictureDataset
from simpletuner.errors import ExitCode, UserError
from simpletuner.job import write_atomic
from simpletuner.retry import Passing, Retry

_COMMIT = re.compile(r"[0-9a-f]{40}")


class RepositoryFile(NamedTuple):
    path: str
    num_bytes: int
    version: str
    """Git's or LFS's name of the content."""


class Snapshot(NamedTuple):
    commit: str
    files: list[RepositoryFile]


class HubRepository:
    """Without a line to the hub, what was fetched once is used, at the commit that was seen last."""

    def __init__(self, dataset: PictureDataset, cache_dir: Path, retry: Retry | None = None) -> None:
        assert dataset.dataset_name is not None
        self.name = dataset.dataset_name
        self._id = dataset.id
        self._revision = dataset.revision
        self._retry = retry or Retry()
        self._commit = dataset.revision or "main"
        key = sha256(f"{self.name}@{self._commit}".encode()).hexdigest()
        self._memory = cache_dir / f"hub-{key[:16]}.json"

    def resolve(self) -> Snapshot:
        """The commit that `revision` is now, and its files; a commit is asked for once only.

        Raises UserError `storage_missing` (65), `storage_denied` or `storage_unavailable` (69).
        """
        known = self._remembered()
        if known is None or not _COMMIT.fullmatch(self._revision or ""):
            try:
                known = self._retry(self._look)
            except _Unreachable:
                if known is None:
                    raise
            else:
                self._memory.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self._memory, json.dumps(known).encode())
        self._commit = known.commit
        return known

    def fetch(self, path: str) -> Path:
        """A file of the commit that was resolved, on this disk. Raises as `resolve` does, OSError for no such file."""
        from huggingface_hub import hf_hub_download

        with self._failures(f"{self.name}/{path}"):  # the library itself tries again
            return Path(hf_hub_download(self.name, path, repo_type="dataset", revision=self._commit))

    def missing(self, message: str, hint: str, key: str) -> UserError:
        """What was asked for is not in the repository."""
        return UserError(
            "storage_missing",
            f"Dataset {self._id!r}: {message}",
            hint=hint,
            pointer=f"/{key}",
            exit_code=ExitCode.DATA,
        )

    def _look(self) -> Snapshot:
        from huggingface_hub import HfApi

        with self._failures(self.name):
            found = HfApi().dataset_info(self.name, revision=self._revision, files_metadata=True)
        files = [
            RepositoryFile(row.rfilename, row.size or 0, row.lfs.sha256 if row.lfs else row.blob_id or "")
            for row in found.siblings or ()
        ]
        return Snapshot(str(found.sha), files)

    def _remembered(self) -> Snapshot | None:
        """A memory that cannot be read is none."""
        try:
            commit, files = json.loads(self._memory.read_bytes())
            return Snapshot(str(commit), [RepositoryFile(*row) for row in files])
        except (OSError, ValueError, TypeError):
            return None

    @contextmanager
    def _failures(self, what: str) -> Generator[None]:
        from httpx2 import HTTPError
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            yield
        except GatedRepoError as error:
            raise self._denied(f"{self.name} is given to those only who were let in") from error
        except RepositoryNotFoundError as error:
            hint = "Correct `dataset_name`; a private dataset needs HF_TOKEN of somebody who may read it."
            raise self.missing(f"the hub has no dataset {self.name}.", hint, "dataset_name") from error
        except RevisionNotFoundError as error:
            hint = "Correct `revision`: a branch, a tag or a commit."
            raise self.missing(f"{self.name} has no revision {self._revision!r}.", hint, "revision") from error
        except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            raise self._unavailable(_Unreachable, what, error) from error
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{what} is not there") from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise self._denied(f"{what} may not be read") from error
            if status >= 500 or status in (408, 429):
                raise self._unavailable(Passing, what, error) from error
            raise self._unavailable(_Unreachable, what, error) from error
        except HTTPError as error:
            raise self._unavailable(_Unreachable, what, error) from error

    def _denied(self, reason: str) -> UserError:
        return UserError(
            "storage_denied",
            f"Dataset {self._id!r}: {reason}.",
            hint=f"Ask for access on the page of {self.name}, and set HF_TOKEN to a token of that account.",
            pointer="/dataset_name",
            exit_code=ExitCode.OUTSIDE,
        )

    def _unavailable(self, kind: type[UserError], what: str, error: Exception) -> UserError:
        return kind(
            "storage_unavailable",
            f"Dataset {self._id!r}: {what} cannot be had from the hub: {' '.join(str(error).split())}",
            hint="Look after the network, HF_ENDPOINT and HF_HUB_OFFLINE. What was fetched once needs no network.",
            pointer="/dataset_name",
            exit_code=ExitCode.OUTSIDE,
        )


class _Unreachable(UserError):
    """No answer at all, or one that says nothing about what was asked."""
