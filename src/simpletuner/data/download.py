"""Fetches a picture from a URL that somebody else may have written."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import httpx2

import simpletuner
from simpletuner.config.webhook import literal_address, refused_address
from simpletuner.errors import ExitCode
from simpletuner.retry import Passing, Retry

MOST_BYTES = 200 << 20
_MOST_REDIRECTS = 5
_SILENCE_S = 20.0
_WHOLE_S = 300.0
_UNTYPED = ("application/octet-stream", "binary/octet-stream", "")


class Refused(Exception):
    """It cannot be had, or must not; the text says why. It never holds the query of a URL, which may be a key."""


class Downloader:
    """http and https alone, few redirects, to no address where clouds hand out credentials.

    Names are looked up here before they are asked for; where a proxy is set, it does so again in its own way.
    """

    def __init__(self, retry: Retry | None = None, most_bytes: int = MOST_BYTES) -> None:
        self._retry = retry or Retry(delays_s=(1.0, 4.0))
        self._most_bytes = most_bytes
        self._client = httpx2.Client(
            timeout=_SILENCE_S,
            headers={"User-Agent": f"SimpleTuner/{simpletuner.__version__}"},
            limits=httpx2.Limits(max_connections=32),
        )

    def __enter__(self) -> Downloader:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def fetch(self, url: str) -> bytes:
        """Raises Refused."""
        try:
            return self._retry(lambda: self._follow(url))
        except Passing as error:
            raise Refused(error.message) from error

    def _follow(self, url: str) -> bytes:
        deadline = time.monotonic() + _WHOLE_S
        try:
            _check_target(httpx2.URL(url))
            request = self._client.build_request("GET", url)
            for _ in range(_MOST_REDIRECTS + 1):
                _check_target(request.url)
                response = self._client.send(request, stream=True)
                try:
                    if response.next_request is None:
                        return self._receive(response, lambda: time.monotonic() > deadline)
                    request = response.next_request
                finally:
                    response.close()
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, ValueError) as error:
            raise Refused(f"it is no URL that can be fetched: {error}") from error
        except httpx2.TimeoutException as error:
            raise _passing(f"no answer within {_SILENCE_S:g} s") from error
        except httpx2.HTTPError as error:
            raise _passing(f"no connection: {error}" if str(error) else "the connection broke off") from error
        raise Refused(f"it is redirected more than {_MOST_REDIRECTS} times")

    def _receive(self, response: httpx2.Response, is_late: Callable[[], bool]) -> bytes:
        status = response.status_code
        if status >= 500 or status in (408, 429):
            raise _passing(f"the server answers {status}")
        if status != 200:
            raise Refused(f"the server answers {status}")
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind not in _UNTYPED:
            raise Refused(f"it is {kind}, no picture")
        content = bytearray()
        for part in response.iter_bytes():
            content += part
            if len(content) > self._most_bytes:
                raise Refused(f"it is larger than {self._most_bytes >> 20} MiB")
            if is_late():
                raise Refused(f"it takes more than {_WHOLE_S:g} s")
        if not content:
            raise Refused("it is empty")
        return bytes(content)


def _check_target(url: httpx2.URL) -> None:
    if url.scheme not in ("http", "https") or not url.host:
        raise Refused(f"only http and https are fetched, not {url.scheme or 'a path'}")
    if url.userinfo:
        raise Refused("it carries a name or password")
    for host in {url.host, *_addresses(url.host)}:
        address = literal_address(host)
        if address is not None and (kind := refused_address(address)):
            raise Refused(f"it leads to a {kind} address")


def _addresses(host: str) -> list[str]:
    """None where the name is not known here: behind a proxy that is usual, and else the request fails itself."""
    try:
        return [str(row[4][0]) for row in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []


def _passing(reason: str) -> Passing:
    return Passing("download_failed", reason, exit_code=ExitCode.OUTSIDE)
