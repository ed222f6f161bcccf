"""Where events are posted: the endpoints of `webhook_config`. api.md §2.6."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from simpletuner.config.directories import Directories
from simpletuner.config.json_text import read_json
from simpletuner.errors import Problem, UserError
from simpletuner.events import Severity

OPTION = "webhook_config"
MASK = "***"
MOST_ENDPOINTS = 20
SECRETS = ("auth_token", "secret")
URL_NAMES = ("callback_url", "webhook_url")
LEVELS = (Severity.DEBUG, Severity.INFO, Severity.WARNING, Severity.ERROR, Severity.CRITICAL)
METADATA_ADDRESSES = frozenset(
    ipaddress.ip_address(text) for text in ("169.254.169.254", "fd00:ec2::254", "100.100.100.200", "192.0.0.192")
)
"""Where clouds hand out credentials to whoever asks from the machine; not all of them are link-local."""

Text = Annotated[str, Field(min_length=1, max_length=2000)]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class WebhookEndpoint(BaseModel):
    """One place that events are posted to. `events` are globs of event types; empty means all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    webhook_type: Literal["raw", "discord"] = "raw"
    callback_url: Text
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"
    ssl_no_verify: bool = False
    auth_token: Text | None = None
    secret: Text | None = None
    message_prefix: Text | None = None
    events: list[Text] = Field(default_factory=list[str], max_length=50)

    @field_validator("callback_url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError as error:
            raise PydanticCustomError("bad_url", "is no URL") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PydanticCustomError("bad_url", "must begin with http:// or https:// and name a host")
        if parts.username is not None:
            raise PydanticCustomError("bad_url", "must not carry a name or password; send a token as auth_token")
        if MASK in url:
            raise PydanticCustomError("masked", "is masked, and no stored endpoint has this URL")
        address = literal_address(parts.hostname)
        if address is not None and (reason := refused_address(address)):
            raise PydanticCustomError("refused_target", "points at a {reason} address", {"reason": reason})
        return url

    @field_validator("auth_token", "secret")
    @classmethod
    def _check_secret(cls, value: str | None) -> str | None:
        if value == MASK:
            raise PydanticCustomError("masked", "is masked, and no stored endpoint has this URL")
        if value is not None and not (value.isascii() and value.isprintable()):
            raise PydanticCustomError("bad_token", "may hold printable ASCII characters only")
        return value

    def wants(self, type_: str, severity: str) -> bool:
        wanted = not self.events or any(fnmatchcase(type_, glob) for glob in self.events)
        return wanted and _rank(severity) >= _rank(self.log_level)

    @property
    def shown_url(self) -> str:
        """Without what must stay secret: a Discord URL is its own password, a query may hold one."""
        parts = urlsplit(self.callback_url)
        place = f"{parts.scheme}://{parts.netloc}"
        if self.webhook_type == "discord":
            return f"{place}/{MASK}"
        return f"{place}{parts.path}" + (f"?{MASK}" if parts.query else "")


def literal_address(host: str) -> Address | None:
    """None for a name. An IPv4 address written as IPv6 is the IPv4 address that it reaches."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address.sixtofour or _from_nat64(address) or address
    return address


def _from_nat64(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    is_nat64 = address in ipaddress.IPv6Network("64:ff9b::/96")
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if is_nat64 else None


def refused_address(address: Address, *, allow_private: bool = True) -> str:
    """Why nothing is ever posted there, or an empty string."""
    kinds = (
        ("metadata", address in METADATA_ADDRESSES),
        ("link-local", address.is_link_local),
        ("multicast", address.is_multicast),
        ("unspecified", address.is_unspecified or (address.version == 4 and int(address) >> 24 == 0)),
        ("reserved", address.is_reserved and not address.is_loopback),
        ("private", not allow_private and not address.is_global),
    )
    return next((kind for kind, applies in kinds if applies), "")


def read_webhooks(value: Any, directories: Directories) -> tuple[list[WebhookEndpoint], list[Problem]]:
    """The endpoints of an option value: an object, a list, or the path of a JSON file with either."""
    pointer = f"/--{OPTION}"
    if isinstance(value, str):
        try:
            value = _read_file(value, directories)
        except UserError as error:
            return [], [
                Problem(code=error.code, option=OPTION, message=error.message, hint=error.hint, pointer=pointer)
            ]
    return parse_webhooks(value, pointer=pointer)


def parse_webhooks(value: Any, *, pointer: str = "") -> tuple[list[WebhookEndpoint], list[Problem]]:
    """The endpoints that are right, and what is wrong with the others."""
    rows = cast(list[Any], value) if isinstance(value, list) else [value]
    if len(rows) > MOST_ENDPOINTS:
        return [], [_problem(f"A run posts to at most {MOST_ENDPOINTS} endpoints.", "", pointer)]
    found: list[WebhookEndpoint] = []
    problems: list[Problem] = []
    for number, row in enumerate(rows):
        place = f"{pointer}/{number}" if isinstance(value, list) else pointer
        if not isinstance(row, dict):
            hint = 'Write {"webhook_type": "raw", "callback_url": "https://…"}, or a list of such objects.'
            problems.append(_problem("A webhook is an object.", hint, place))
            continue
        try:
            found.append(WebhookEndpoint.model_validate(_one_url(cast(dict[str, Any], row))))
        except ValidationError as error:
            problems += _explain(error, cast(dict[str, Any], row), place)
    return found, problems


def frozen_endpoints(config: Mapping[str, Any]) -> tuple[list[WebhookEndpoint], float]:
    """Of a job's frozen configuration: the endpoints, and the least seconds between two progress posts."""
    endpoints = [WebhookEndpoint.model_validate(row) for row in config.get(OPTION) or ()]
    return endpoints, float(config.get("webhook_reporting_interval") or 0.0)


def mask_webhooks(value: Any) -> Any:
    """An option value without its secrets, in its own form; text that is no JSON is a path and is shown."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return mask_webhooks(read_json(value, name=OPTION)[0])
        except UserError:
            return MASK
    if isinstance(value, list):
        return [mask_webhooks(row) for row in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    row = cast(dict[str, Any], value)
    shown = {key: MASK if key in SECRETS and secret else secret for key, secret in row.items()}
    return shown | ({key: _masked_url(row) for key in URL_NAMES if key in row} if _is_discord(row) else {})


def unmask_webhooks(value: Any, stored: Any) -> Any:
    """Put back the secrets that `mask_webhooks` hid, for endpoints whose URL is the same.

    A token must not follow to another URL: whoever may edit the URL need not know the token.
    """
    if value == MASK:
        return stored
    if isinstance(stored, str):
        try:
            stored = read_json(stored, name=OPTION)[0]
        except UserError:
            return value  # a path, or broken text that this write replaces
    known = cast(list[Any], stored if isinstance(stored, list) else [stored])
    if isinstance(value, list):
        return [_unmask_one(row, known, number) for number, row in enumerate(cast(list[Any], value))]
    return _unmask_one(value, known, 0)


def _unmask_one(value: Any, known: Sequence[Any], number: int) -> Any:
    """From the stored endpoint in the same place if it has the same URL, else from the first that has."""
    if not isinstance(value, dict) or MASK not in str(cast(Any, value)):
        return value
    row = cast(dict[str, Any], value)
    likely = [*known[number : number + 1], *known]
    same = next((old for old in likely if isinstance(old, dict) and _url_of(mask_webhooks(old)) == _url_of(row)), None)
    if same is None:
        return row
    # The URL of the stored one may have been written under its other name.
    stored = cast(dict[str, Any], same) | {key: _url_of(cast(dict[str, Any], same)) for key in URL_NAMES if key in row}
    hidden = (*SECRETS, *(URL_NAMES if _is_discord(row) else ()))
    return {key: stored.get(key, part) if key in hidden and MASK in str(part) else part for key, part in row.items()}


def _rank(level: str) -> int:
    """`success`, and whatever else a journal may say, counts as info."""
    return next((rank for rank, known in enumerate(LEVELS) if known == level), LEVELS.index(Severity.INFO))


def _read_file(path: str, directories: Directories) -> Any:
    file = directories.locate(path)
    try:
        return read_json(file.read_text(encoding="utf-8"), name=path)[0]
    except (OSError, ValueError) as error:
        places = " or ".join(str(place) for place in directories.candidates(path))
        hint = f"Give JSON text, or a JSON file at {places}."
        raise UserError("bad_webhook", f"The webhook file {path!r} cannot be read.", hint=hint) from error


def _one_url(row: Mapping[str, Any]) -> dict[str, Any]:
    """Both names of the URL mean the same; two of them are left for the model to refuse."""
    renamed = dict(row)
    if "webhook_url" in renamed and "callback_url" not in renamed:
        renamed["callback_url"] = renamed.pop("webhook_url")
    return renamed


def _explain(error: ValidationError, row: Mapping[str, Any], place: str) -> Iterator[Problem]:
    known = [*WebhookEndpoint.model_fields, "webhook_url"]
    for item in error.errors():
        path: Sequence[str | int] = item["loc"]
        name = str(path[0]) if path else ""
        written = "webhook_url" if name == "callback_url" and name not in row and "webhook_url" in row else name
        pointer = "/".join([place, written, *(str(part) for part in path[1:])])
        if item["type"] == "extra_forbidden" and written == "webhook_url":
            yield _problem("callback_url and webhook_url are one field; both are given.", "Remove one.", pointer)
        elif item["type"] == "extra_forbidden":
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            yield _problem(f"A webhook has no field {name!r}.", hint, pointer, code="unknown_field")
        elif item["type"] == "missing":
            yield _problem("callback_url is missing.", "Say where events are posted.", pointer)
        else:
            yield _problem(f"{written}: {item['msg']}.", "", pointer)


def _problem(message: str, hint: str, pointer: str, *, code: str = "bad_webhook") -> Problem:
    return Problem(code=code, option=OPTION, message=message, hint=hint, pointer=pointer)


def _is_discord(row: Mapping[str, Any]) -> bool:
    return row.get("webhook_type") == "discord"


def _url_of(row: Mapping[str, Any]) -> Any:
    return row.get("callback_url", row.get("webhook_url"))


def _masked_url(row: Mapping[str, Any]) -> str:
    scheme, _, rest = str(_url_of(row)).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}/{MASK}"
