"""Speaks to the server: every call of an agent, and of a keeper about its job."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from simpletuner.worker.assignment import Assignment

CONNECT_S = 10.0
ANSWER_S = 60.0


class Unreachable(Exception):
    """No answer came, or one that says to try again."""


class Refused(Exception):
    """The server answered no."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.hint = hint


class Link:
    """Use one in each thread."""

    def __init__(self, url: str, headers: dict[str, str], *, verifies_tls: bool) -> None:
        self._http = httpx2.Client(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            verify=verifies_tls and not url.lower().startswith("http:"),
        )

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, path: str, *, within_s: float | None = None, **more: Any) -> httpx2.Response:
        """Raises Unreachable, or Refused. `within_s`: in which the answer must begin."""
        if within_s is not None:
            more["timeout"] = httpx2.Timeout(within_s, connect=min(within_s, CONNECT_S))
        try:
            answer = self._http.request(method, path, **more)
        except httpx2.TransportError as error:
            raise Unreachable(str(error) or type(error).__name__) from error
        _check(answer)
        return answer

    @contextmanager
    def stream(self, path: str, **more: Any) -> Generator[httpx2.Response]:
        """Raises Unreachable also while it is read, or Refused."""
        try:
            with self._http.stream("GET", path, **more) as answer:
                if not answer.is_success:
                    answer.read()
                _check(answer)
                yield answer
        except httpx2.TransportError as error:
            raise Unreachable(str(error) or type(error).__name__) from error


def _check(answer: httpx2.Response) -> None:
    if answer.is_success:
        return
    try:
        body: dict[str, Any] = answer.json()
        # Of a finding about the job the server's own code is in the list.
        told: dict[str, Any] = next(iter(body.get("errors") or []), body)
        code, message, hint = str(told["code"]), str(body["detail"]), str(body.get("hint") or "")
    except (ValueError, KeyError, TypeError):
        code, message, hint = "", f"The server answered {answer.status_code}.", ""
    # A proxy whose server is away, a server that is overrun, one whose disk is full: none of them is a no.
    if answer.status_code >= 500 or answer.status_code == 429:
        raise Unreachable(message)
    raise Refused(answer.status_code, code, message, hint)


class JobLink:
    """The calls of §2.11 about one job, under its token."""

    def __init__(self, assignment: Assignment) -> None:
        headers = {"X-Upload-Token": assignment.upload_token}
        self._link = Link(assignment.server_url, headers, verifies_tls=assignment.verifies_tls)
        self._epoch = assignment.epoch
        self._job = f"/api/workers/job/{assignment.job_id}"
        self._storage = assignment.upload_endpoint
        self._patience_s = assignment.lease_s / 12

    def close(self) -> None:
        self._link.close()

    def ack(self, *, accepted: bool, reason: str | None = None) -> dict[str, Any]:
        body = {"epoch": self._epoch, "accepted": accepted} | ({"reason": reason} if reason else {})
        return self._link.ask("POST", f"{self._job}/ack", json=body).json()

    def renew(self, wait_s: float) -> dict[str, Any]:
        """Of a line that is dead it must be known soon, so that there is time for another."""
        body = {"epoch": self._epoch, "wait": wait_s}
        within_s = wait_s + self._patience_s
        return self._link.ask("POST", f"{self._job}/lease", within_s=within_s, json=body).json()

    def end(self, record: dict[str, Any]) -> None:
        self._link.ask("POST", f"{self._job}/status", json={"epoch": self._epoch, "status": "ended", "exit": record})

    def append(self, what: str, content: bytes, offset: int) -> int:
        """To the `journal` or the `log`; returns the next offset. Raises Refused `offset_mismatch`."""
        params = {"epoch": self._epoch, "offset": offset}
        return self._link.ask("PUT", f"{self._job}/{what}", params=params, content=content).json()["next_offset"]

    def inputs(self) -> dict[str, list[dict[str, Any]]] | None:
        """None while the server is still listing them."""
        answer = self._link.ask("GET", f"{self._storage}/inputs.json", params={"epoch": self._epoch})
        return answer.json()["inputs"] if answer.status_code == 200 else None

    @contextmanager
    def read_input(self, name: str, path: str, first: int) -> Generator[Iterable[bytes]]:
        """The bytes from `first` on."""
        headers = {"Range": f"bytes={first}-"} if first else {}
        place = f"{self._storage}/inputs/{quote(name)}/{quote(path)}"
        with self._link.stream(place, params={"epoch": self._epoch}, headers=headers) as answer:
            yield answer.iter_bytes(1 << 20)

    def offset(self, path: str) -> tuple[int, bool]:
        """How much of a file the server has, and whether that is all of it."""
        answer = self._link.ask("HEAD", f"{self._storage}/{quote(path)}", params={"epoch": self._epoch})
        return int(answer.headers["Upload-Offset"]), answer.headers["Upload-Complete"] == "?1"

    def put(self, path: str, part: bytes, first: int, total: int, sha256: str) -> int:
        """Returns the next byte to send."""
        last = max(first, first + len(part) - 1)
        headers = {"Content-Range": f"bytes {first}-{last}/{total}", "X-Content-SHA256": sha256}
        place, params = f"{self._storage}/{quote(path)}", {"epoch": self._epoch}
        return self._link.ask("PUT", place, params=params, headers=headers, content=part).json()["next_offset"]

    def publish(self, outputs: dict[str, Any]) -> list[str]:
        """Returns what is missing there: nothing has changed then."""
        answer = self._link.ask("PUT", f"{self._storage}/outputs.json", params={"epoch": self._epoch}, json=outputs)
        return answer.json()["missing"]


def read_part(path: Path, first: int, most: int) -> bytes:
    with path.open("rb") as file:
        file.seek(first)
        return file.read(most)
