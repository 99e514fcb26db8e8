"""The guard: no connection to an address that is not public, judged when connecting, on every hop.

Names are resolved here and nowhere else, so that what was judged is what is connected to. The only exemption is a host of
``fetch.resolve``, which goes to exactly the address and port given for it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_CACHE_S = 300.0


class ForbiddenAddressError(OSError):
    """The address is private, local, or otherwise not of the public internet."""


class NameError_(OSError):  # noqa: N801 - NameError is Python's
    """The name does not resolve."""


def literal(host: str) -> Address | None:
    """The address that a host spells out, in any form a resolver takes: dotted, decimal, octal, hex, IPv6; else None."""
    text = host.strip("[]").partition("%")[0]
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        pass
    try:  # inet_aton knows 127.1, 0x7f000001, 017700000001, 2130706433
        return ipaddress.IPv4Address(socket.inet_aton(text))
    except (OSError, UnicodeError):
        return None


def is_public(address: Address) -> bool:
    """Whether an address, and any IPv4 address wrapped in it, is globally reachable."""
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(inner) for inner in wrapped if inner is not None):
            return False
        if address.ipv4_mapped is not None or address in _NAT64:
            return True
    return address.is_global and not address.is_multicast


async def system_lookup(host: str) -> list[str]:
    """Addresses of a name, by the system's resolver.

    Raises:
        OSError: the name does not resolve.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class GuardedResolver(AbstractResolver):
    """Resolver of aiohttp that answers public addresses only, and remembers them for five minutes."""

    def __init__(
        self,
        resolve: Mapping[str, str],
        *,
        lookup: Callable[[str], Any] = system_lookup,
        record: Callable[[str, int], None] | None = None,
        max_lookups: int = 32,
    ) -> None:
        self._resolve = {host.lower(): place for host, place in resolve.items()}
        self._lookup = lookup
        self._record = record
        self._limit = asyncio.Semaphore(max_lookups)
        self._known: dict[str, tuple[float, list[str]]] = {}

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Addresses to connect to.

        Raises:
            ForbiddenAddressError: one of them is not public.
            NameError_: there is none.
        """
        del family
        exempt = self._resolve.get(host.lower())
        if exempt is not None:
            address, _, exempt_port = exempt.rpartition(":")
            return [self._answer(host, address.strip("[]"), int(exempt_port))]
        spelled = literal(host)
        addresses = [str(spelled)] if spelled is not None else await self._addresses(host)
        for address in addresses:
            if not is_public(ipaddress.ip_address(address.partition("%")[0])):
                raise ForbiddenAddressError(f"{host} is at {address}, which is not public")
        return [self._answer(host, address, port) for address in addresses]

    def check_literal(self, host: str, port: int) -> None:
        """Judge a host that is an address itself: aiohttp connects to these without asking a resolver.

        Raises:
            ForbiddenAddressError: it is not public.
        """
        spelled = literal(host)
        if spelled is None or host.lower() in self._resolve:
            return
        if not is_public(spelled):
            raise ForbiddenAddressError(f"{host} is not public")
        if self._record is not None:
            self._record(str(spelled), port)

    async def close(self) -> None:
        """Nothing is held."""

    async def _addresses(self, host: str) -> list[str]:
        known = self._known.get(host)
        if known is not None and time.monotonic() - known[0] < _CACHE_S:
            return known[1]
        async with self._limit:
            try:
                found = list(await self._lookup(host))
            except (OSError, UnicodeError) as error:
                raise NameError_(f"{host} does not resolve: {error}") from None
        if not found:
            raise NameError_(f"{host} does not resolve")
        self._known[host] = (time.monotonic(), found)
        return found

    def _answer(self, host: str, address: str, port: int) -> ResolveResult:
        if self._record is not None:
            self._record(address, port)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return ResolveResult(
            hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST
        )
