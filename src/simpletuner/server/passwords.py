"""Passwords as argon2id hashes (RFC 9106, the library's parameters)."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argon2 import PasswordHasher

FEWEST_CHARS = 8
MOST_CHARS = 256
MOST_AT_ONCE = 2
"""Each takes 64 MiB while it works."""


class Passwords:
    """The library is loaded at the first use: few starts of a server see one."""

    def __init__(self) -> None:
        self._room = threading.BoundedSemaphore(MOST_AT_ONCE)
        self._decoy: str | None = None

    def hash(self, password: str) -> str:
        with self._room:
            return _hasher().hash(password)

    def matches(self, password: str, stored: str | None) -> bool:
        """Takes as long for None, the hash of a user that is not there."""
        from argon2.exceptions import VerifyMismatchError

        with self._room:
            hasher = _hasher()
            # Made before it is known whether it is needed: the first wrong name must not take longer either.
            self._decoy = self._decoy or hasher.hash("no user has this password")
            try:
                hasher.verify(stored or self._decoy, password)
            except VerifyMismatchError:
                return False
        return stored is not None


def _hasher() -> PasswordHasher:
    from argon2 import PasswordHasher

    return PasswordHasher()
