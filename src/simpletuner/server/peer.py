"""Who is at the other end: the socket's peer, or whom a trusted proxy names."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import Scope

from simpletuner.errors import UserError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
FORWARDING_HEADERS = frozenset({"forwarded", "x-real-ip", "via"})


def parse_networks(names: tuple[str, ...]) -> tuple[Network, ...]:
    """Addresses and networks (`10.0.0.0/8`). Raises UserError `invalid_config`."""
    try:
        return tuple(ipaddress.ip_network(name, strict=False) for name in names)
    except ValueError as error:
        hint = "For example --trusted-proxies 127.0.0.1,10.0.0.0/8."
        raise UserError("invalid_config", f"trusted_proxies: {error}.", hint=hint) from error


def believe_proxies(scope: Scope, trusted: tuple[Network, ...]) -> None:
    """Put the asker's address and scheme into `scope`, where the socket's peer may say them; nobody else is believed.

    Of `X-Forwarded-For` the last address that is no trusted proxy counts: what stands before it, its owner wrote.
    """
    if not _is_trusted(peer_of(scope), trusted):
        return
    headers = Headers(scope=scope)
    chain = [part.strip() for value in headers.getlist("x-forwarded-for") for part in value.split(",") if part.strip()]
    chain = chain or [value.strip() for value in headers.getlist("x-real-ip")]
    asker = next((address for address in reversed(chain) if not _is_trusted(address, trusted)), None)
    if asker is not None and _address(asker) is not None:
        scope["client"] = (asker, 0)
    protocol = headers.get("x-forwarded-proto", "").rpartition(",")[2].strip().lower()
    secure = {"http": False, "ws": False, "https": True, "wss": True}.get(protocol)
    if secure is not None:
        plain = "ws" if scope["type"] == "websocket" else "http"
        scope["scheme"] = plain + ("s" if secure else "")


def peer_of(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def is_direct_loopback(scope: Scope) -> bool:
    """The *socket peer* counts: what headers say of another sender only takes the identity away."""
    headers = Headers(scope=scope)
    if any(name in FORWARDING_HEADERS or name.startswith("x-forwarded-") for name in headers):
        return False
    peer = _address(peer_of(scope))
    return peer is not None and peer.is_loopback and host_name(headers.get("host", "")) in LOOPBACK_NAMES


def is_secure(scope: Scope) -> bool:
    return scope["scheme"] in {"https", "wss"}


def host_name(host: str) -> str:
    """Without the port; IPv6 keeps its brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[: host.find("]") + 1]
    name, _, port = host.partition(":")
    return name if not port or port.isdigit() else host


def _is_trusted(address: str, trusted: tuple[Network, ...]) -> bool:
    parsed = _address(address)
    return parsed is not None and any(parsed in network for network in trusted)


def _address(text: str) -> Address | None:
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed
