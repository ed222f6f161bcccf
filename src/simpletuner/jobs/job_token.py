"""What a runner on a worker proves itself with: good for one job and one epoch, and stored nowhere."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

KEY_BYTES = 32
_TOKEN = re.compile(r"jt_([0-9a-z]{1,64})_(\d{1,9})_([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whom a token speaks for."""

    job_id: str
    epoch: int


class JobTokens:
    """A token is a message authentication code (HMAC-SHA-256) of what it is good for, under a key of this server."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def open(cls, file: Path) -> JobTokens:
        """The key is in `file`, and made at the first call."""
        try:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls(file.read_bytes())
        with os.fdopen(handle, "wb") as new:
            new.write(secrets.token_bytes(KEY_BYTES))
            new.flush()
            os.fsync(new.fileno())
        return cls(file.read_bytes())

    def mint(self, job_id: str, epoch: int) -> str:
        return f"jt_{job_id}_{epoch}_{self._code(job_id, epoch)}"

    def read(self, token: str) -> Bearer | None:
        """None for what this server never gave out."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        bearer = Bearer(match[1], int(match[2]))
        genuine = hmac.compare_digest(match[3], self._code(bearer.job_id, bearer.epoch))
        return bearer if genuine else None

    def _code(self, job_id: str, epoch: int) -> str:
        return hmac.new(self._key, f"{job_id}:{epoch}".encode(), hashlib.sha256).hexdigest()
