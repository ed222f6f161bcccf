"""Posts one event to one endpoint, in the form that its type wants. api.md §2.6."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx2

import simpletuner
from simpletuner.config.webhook import WebhookEndpoint
from simpletuner.errors import UserError
from simpletuner.jobs.event_view import media_of
from simpletuner.jobs.webhook_target import TargetRules

TIMEOUT_S = 10.0
DISCORD_CHARS = 2000
DISCORD_FILES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`refused`: the guard forbids the target, so trying again is of no use."""

    status: int | None = None
    error: str | None = None
    retry_after_s: float = 0.0
    refused: bool = False

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class Poster:
    def __init__(
        self, rules: TargetRules, *, timeout_s: float = TIMEOUT_S, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives Unix seconds."""
        self._rules = rules
        self._timeout_s = timeout_s
        self._clock = clock

    async def post(self, endpoint: WebhookEndpoint, event: Mapping[str, Any], delivery_id: str) -> Outcome:
        """What came of it; a target that cannot be reached is an outcome too."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._post(endpoint, event, delivery_id)
        except (TimeoutError, httpx2.TimeoutException):
            return Outcome(error=f"No answer within {self._timeout_s:g} s.")
        except UserError as error:
            return Outcome(error=error.message, refused=True)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError) as error:
            return Outcome(error=f"{type(error).__name__}: {error}"[:500])

    async def _post(self, endpoint: WebhookEndpoint, event: Mapping[str, Any], delivery_id: str) -> Outcome:
        url = httpx2.URL(endpoint.callback_url)
        headers = {
            "Host": url.netloc.decode("ascii"),
            "User-Agent": f"SimpleTuner/{simpletuner.__version__}",
            "X-SimpleTuner-Event": str(event["type"]),
            "X-SimpleTuner-Delivery": delivery_id,
        }
        if endpoint.auth_token is not None:
            headers["X-API-Key"] = endpoint.auth_token
        if endpoint.webhook_type == "raw":
            content = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
            headers["Content-Type"] = "application/json"
            if endpoint.secret is not None:
                headers["X-SimpleTuner-Signature"] = sign(content, endpoint.secret, int(self._clock()))
            body: dict[str, Any] = {"content": content}
        else:
            body = discord_body(endpoint, event)
        addresses = await self._rules.resolve(url)
        for address in addresses[:-1]:
            # A name may have an address of a kind that its server does not listen on.
            try:
                return await self._send(endpoint, url, address, headers, body, len(addresses))
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
        return await self._send(endpoint, url, addresses[-1], headers, body, len(addresses))

    async def _send(
        self,
        endpoint: WebhookEndpoint,
        url: httpx2.URL,
        address: str,
        headers: Mapping[str, str],
        body: Mapping[str, Any],
        num_addresses: int,
    ) -> Outcome:
        """Straight to `address`, under the name in the URL: no proxy, no redirect, no log line with the URL."""
        wait_s = dict.fromkeys(("read", "write", "pool"), self._timeout_s)
        extensions: dict[str, Any] = {"timeout": wait_s | {"connect": self._timeout_s / num_addresses}}
        if url.scheme == "https":
            extensions["sni_hostname"] = url.raw_host.decode("ascii")
        target = url.copy_with(host=address)
        request = httpx2.Request("POST", target, headers=dict(headers), extensions=extensions, **body)
        verify = False if endpoint.ssl_no_verify or url.scheme == "http" else self._trusted
        async with httpx2.AsyncHTTPTransport(verify=verify, trust_env=False) as transport:
            answer = await transport.handle_async_request(request)
            await answer.aclose()
        # The body of the answer is never read: nothing there matters, and it may have no end.
        outcome = Outcome(status=answer.status_code, retry_after_s=_seconds(answer.headers.get("retry-after")))
        if outcome.delivered:
            return outcome
        error = f"The endpoint answered {answer.status_code}."
        return Outcome(status=outcome.status, error=error, retry_after_s=outcome.retry_after_s)

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        return httpx2.create_ssl_context()


def sign(content: bytes, secret: str, unix_s: int) -> str:
    """`t=<unix>,v1=<hmac-sha256 hex of "t.body">`: the time is signed too, so that old posts cannot be replayed."""
    digest = hmac.new(secret.encode(), f"{unix_s}.".encode() + content, hashlib.sha256).hexdigest()
    return f"t={unix_s},v1={digest}"


def discord_body(endpoint: WebhookEndpoint, event: Mapping[str, Any]) -> dict[str, Any]:
    """As keyword arguments of a request: JSON, or multipart with the pictures of the event."""
    lines = "\n".join((event.get("data") or {}).get("lines", ()))
    message = event.get("message") or event.get("body") or lines
    head = " ".join(filter(None, (endpoint.message_prefix, event.get("title"))))
    content = "\n".join(filter(None, (head, message))) or str(event["type"])
    # Nobody is called by a prompt that happens to hold @everyone.
    payload = {"content": content[:DISCORD_CHARS], "allowed_mentions": {"parse": []}}
    files = dict(_files(event))
    if not files:
        return {"json": payload}
    return {"data": {"payload_json": json.dumps(payload, ensure_ascii=False)}, "files": files}


def _files(event: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, bytes, str]]]:
    inlined = [medium for _, medium in media_of(dict(event)) if "src" in medium]
    for number, medium in enumerate(inlined[:DISCORD_FILES]):
        content = base64.b64decode(medium["src"].partition(",")[2])
        yield f"files[{number}]", (medium["artifact_id"], content, medium["mime_type"])


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0
