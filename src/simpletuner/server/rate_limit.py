"""How often somebody may ask (api.md §1.5), counted in memory."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from simpletuner.errors import UserError

Clock = Callable[[], float]

MOST_COUNTED = 10_000
"""Above this many counts and accounts, those that nothing is left of are forgotten."""


@dataclass(frozen=True, slots=True)
class Limit:
    name: str
    most: int
    window_s: float = 60.0


ANONYMOUS = Limit("anonymous", 360)
AUTHENTICATED = Limit("authenticated", 3600)
LOGIN = Limit("login", 15)
REGISTER = Limit("register", 5)
START = Limit("start", 60)
END = Limit("end", 60)
KEYS = Limit("api-keys", 10)
PASSWORD = Limit("password", 5, 300.0)


class RateLimited(UserError):
    """429, with the headers that say how long to wait."""

    def __init__(self, message: str, *, wait_s: float, most: int) -> None:
        seconds = max(1, math.ceil(wait_s))
        super().__init__("rate_limited", message, hint=f"Try again in {seconds} s.")
        self.headers = {
            "Retry-After": str(seconds),
            "X-RateLimit-Limit": str(most),
            "X-RateLimit-Remaining": "0",
            "X-RateLimit-Reset": str(seconds),
        }


class RateLimiter:
    """No more than `most` in any window of a limit, for each that is counted."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._hits: dict[tuple[Limit, str], deque[float]] = {}

    def hit(self, limit: Limit, who: str) -> None:
        """Raises RateLimited; a refused request is not counted."""
        with self._lock:
            now = self._clock()
            if len(self._hits) > MOST_COUNTED:
                self._forget(now)
            hits = self._hits.setdefault((limit, who), deque())
            while hits and hits[0] <= now - limit.window_s:
                hits.popleft()
            if len(hits) >= limit.most:
                message = f"More than {limit.most} requests in {limit.window_s:g} s."
                raise RateLimited(message, wait_s=hits[0] + limit.window_s - now, most=limit.most)
            hits.append(now)

    def _forget(self, now: float) -> None:
        old = [key for key, hits in self._hits.items() if not hits or hits[-1] <= now - key[0].window_s]
        for key in old:
            del self._hits[key]


FREE_FAILURES = 5
LONGEST_WAIT_S = 60.0
FORGOTTEN_AFTER_S = 3600.0


@dataclass(slots=True)
class _Failures:
    count: int = 0
    until: float = 0.0


class LoginBackoff:
    """After five failures in a row an account waits 1, 2, 4 … 60 s between attempts, whoever makes them."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[str, _Failures] = {}

    def check(self, account: str) -> None:
        """Raises RateLimited."""
        with self._lock:
            failures = self._accounts.get(account)
            wait_s = failures.until - self._clock() if failures else 0.0
        if wait_s > 0:
            raise RateLimited("Too many failed logins to this account.", wait_s=wait_s, most=FREE_FAILURES)

    def fail(self, account: str) -> None:
        with self._lock:
            now = self._clock()
            if len(self._accounts) > MOST_COUNTED:
                self._forget(now)
            failures = self._accounts.setdefault(account, _Failures())
            failures.count += 1
            over = failures.count - FREE_FAILURES
            failures.until = now + (min(LONGEST_WAIT_S, 2.0 ** min(over, 6)) if over >= 0 else 0.0)

    def succeed(self, account: str) -> None:
        with self._lock:
            self._accounts.pop(account, None)

    def _forget(self, now: float) -> None:
        old = [name for name, failures in self._accounts.items() if failures.until <= now - FORGOTTEN_AFTER_S]
        for name in old:
            del self._accounts[name]
