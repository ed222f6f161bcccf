"""Asks a server over HTTP: where it is and with which key (api.md §6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx2

from simpletuner.cli.keys import KeyFile
from simpletuner.cli.refusal import ClientExit, Refusal
from simpletuner.config.sources import parse_boolean
from simpletuner.errors import Problem

DEFAULT_PORT = 8001
ANSWER_S = 600.0
"""An archive of many gigabytes is unpacked before the answer comes."""
CONNECT_S = 10.0
PAGE = 500
URL_VARIABLE = "SIMPLETUNER_URL"
KEY_VARIABLE = "SIMPLETUNER_API_KEY"
LOG_IN = f"Log in with `simpletuner auth login`, or set {KEY_VARIABLE}."


class Client:
    """Use it in a `with`.

    `url`: else of the environment. `key`: else of the environment, then of the key file; "" asks without one.
    """

    def __init__(self, environ: Mapping[str, str], *, url: str | None = None, key: str | None = None) -> None:
        self.url = server_url(environ, url)
        if key is None:
            key = find_key(environ, self.url)
        self._has_key = bool(key)
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"X-API-Key": key} if key else {},
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            # Reading the authorities takes a while, and plain http has nothing to verify.
            verify=not self.url.lower().startswith("http:") and not _is_on(environ, "SIMPLETUNER_SSL_NO_VERIFY"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """The JSON of a success. `more` is as of httpx2. Raises Refusal."""
        return self._send(method, path, **more).json()

    def pages(self, path: str, **query: Any) -> Iterator[Any]:
        """The answers of a list that has its length in `X-Total-Count`, page by page."""
        offset, total = 0, 1
        while offset < total:
            answer = self._send("GET", path, params={**query, "limit": PAGE, "offset": offset})
            yield answer.json()
            offset, total = offset + PAGE, int(answer.headers.get("X-Total-Count", 0))

    def _send(self, method: str, path: str, **more: Any) -> httpx2.Response:
        try:
            answer = self._http.request(method, path, **more)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            message = f"No server answers at {self.url}: {error or type(error).__name__}."
            hint = f"Start one with `simpletuner server`, or set {URL_VARIABLE}."
            raise Refusal("unreachable", message, ClientExit.UNREACHABLE, hint=hint) from error
        if answer.is_success:
            return answer
        raise self._refusal(answer)

    def _refusal(self, answer: httpx2.Response) -> Refusal:
        exit_code = ClientExit.DENIED if answer.status_code in {401, 403} else ClientExit.REFUSED
        try:
            body: dict[str, Any] = answer.json()
            problems = [Problem(**item) for item in body.get("errors", [])]
            code, message, hint = body["code"], body["detail"], body.get("hint", "")
        except (ValueError, KeyError, TypeError):
            # A proxy in between speaks for itself.
            return Refusal("refused", f"The server answered {answer.status_code} {answer.reason_phrase}.", exit_code)
        if code == "unauthenticated" or (code == "invalid_credentials" and self._has_key):
            hint = LOG_IN
        return Refusal(code, message, exit_code, hint=hint, problems=problems, body=body)


def place(root: str, *parts: str) -> str:
    """The path of what is named by `parts` below `root`, whatever characters they have."""
    return "/".join((root, *(quote(part, safe="") for part in parts)))


def server_url(environ: Mapping[str, str], flag: str | None = None) -> str:
    if url := flag or environ.get(URL_VARIABLE):
        return url.rstrip("/")
    host = environ.get("SIMPLETUNER_HOST") or "127.0.0.1"
    if host in {"0.0.0.0", "::"}:
        host = "127.0.0.1"
    scheme = "https" if _is_on(environ, "SIMPLETUNER_SSL_ENABLED") else "http"
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{environ.get('SIMPLETUNER_PORT') or DEFAULT_PORT}"


def find_key(environ: Mapping[str, str], url: str) -> str | None:
    """Of the environment, else of the key file."""
    if key := environ.get(KEY_VARIABLE):
        return key
    stored = KeyFile.of(environ).get(url)
    return stored.key if stored else None


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return bool(parse_boolean(environ.get(name, "")))
