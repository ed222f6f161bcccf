"""Asks a server over HTTP: where it is and with which key is in the environment (api.md §6)."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx2

from simpletuner.cli.refusal import ClientExit, Refusal
from simpletuner.config.sources import parse_boolean
from simpletuner.errors import Problem

DEFAULT_PORT = 8001
ANSWER_S = 600.0
"""An archive of many gigabytes is unpacked before the answer comes."""
CONNECT_S = 10.0


class Client:
    """Use it in a `with`."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.url = server_url(environ)
        key = environ.get("SIMPLETUNER_API_KEY")
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"X-API-Key": key} if key else {},
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            verify=not _is_on(environ, "SIMPLETUNER_SSL_NO_VERIFY"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """The JSON of a success. `more` is as of httpx2. Raises Refusal."""
        try:
            answer = self._http.request(method, path, **more)
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            message = f"No server answers at {self.url}: {error or type(error).__name__}."
            hint = "Start one with `simpletuner server`, or set SIMPLETUNER_URL."
            raise Refusal("unreachable", message, ClientExit.UNREACHABLE, hint=hint) from error
        if answer.is_success:
            return answer.json()
        raise _refusal(answer)


def server_url(environ: Mapping[str, str]) -> str:
    if url := environ.get("SIMPLETUNER_URL"):
        return url.rstrip("/")
    host = environ.get("SIMPLETUNER_HOST") or "127.0.0.1"
    if host in {"0.0.0.0", "::"}:
        host = "127.0.0.1"
    scheme = "https" if _is_on(environ, "SIMPLETUNER_SSL_ENABLED") else "http"
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{environ.get('SIMPLETUNER_PORT') or DEFAULT_PORT}"


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return bool(parse_boolean(environ.get(name, "")))


def _refusal(answer: httpx2.Response) -> Refusal:
    exit_code = ClientExit.DENIED if answer.status_code in {401, 403} else ClientExit.REFUSED
    try:
        body: dict[str, Any] = answer.json()
        problems = [Problem(**item) for item in body.get("errors", [])]
        return Refusal(body["code"], body["detail"], exit_code, hint=body.get("hint", ""), problems=problems)
    except (ValueError, KeyError, TypeError):
        # A proxy in between speaks for itself.
        return Refusal("refused", f"The server answered {answer.status_code} {answer.reason_phrase}.", exit_code)
