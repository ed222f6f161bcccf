"""The guard of outgoing posts: which addresses a URL leads to, and whether they may be asked. api.md §2.6.

What is checked is what is connected to: a name that resolves to something else a moment later changes nothing.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass

import httpx2
import psutil

from simpletuner.config.webhook import literal_address, refused_address
from simpletuner.errors import ExitCode, UserError

MOST_ADDRESSES = 4
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRules:
    """`own_port` is that of this server, which must not be made to ask itself."""

    allow_private: bool = True
    own_port: int | None = None

    async def resolve(self, url: httpx2.URL) -> list[str]:
        """The addresses behind `url`, in order. Raises UserError `refused_target` if one of them is forbidden.

        OSError when the name does not resolve.
        """
        port = url.port or PORTS[url.scheme]
        host = url.raw_host.decode("ascii")
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(row[4][0]) for row in found))[:MOST_ADDRESSES]
        for address in addresses:
            if reason := self.refusal(address, port):
                message = f"{host} leads to {address}: {reason}."
                raise UserError("refused_target", message, exit_code=ExitCode.OUTSIDE)
        return addresses

    def refusal(self, address: str, port: int) -> str:
        """Why `address` is not asked, or an empty string."""
        parsed = literal_address(address)
        if parsed is None:
            return "not an address"
        if reason := refused_address(parsed, allow_private=self.allow_private):
            return f"{reason} addresses are never asked"
        is_own = port == self.own_port and (parsed.is_loopback or str(parsed) in _own_addresses())
        return "that is this server's own port" if is_own else ""


def _own_addresses() -> set[str]:
    return {row.address.partition("%")[0] for rows in psutil.net_if_addrs().values() for row in rows}
