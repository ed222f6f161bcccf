"""The one-time token that lets the first admin be made from another machine."""

from __future__ import annotations

import hmac
import os
import secrets
import string
import threading
from pathlib import Path

FILE = "setup-token"
CHARS = 32


def random_text(length: int) -> str:
    """Letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))


class SetupToken:
    """In memory and in `<state>/setup-token`, for its owner's eyes only; a new one at each start."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / FILE
        self._value: str | None = None
        self._lock = threading.Lock()

    def issue(self) -> str:
        with self._lock:
            self._value = random_text(CHARS)
            self.path.unlink(missing_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(self._value + "\n")
            return self._value

    def matches(self, given: str | None) -> bool:
        value = self._value
        return value is not None and given is not None and hmac.compare_digest(value.encode(), given.encode())

    def forget(self) -> None:
        with self._lock:
            self._value = None
            self.path.unlink(missing_ok=True)
