"""The guard against requests into private networks. It stands where connections are made, so every hop passes it.

Three doors, each enough for what it sees: ``connect`` refuses addresses written as such and odd ports, the resolver
refuses names that lead to addresses which are not public, and ``socket_for`` refuses, at the last moment, any socket to
one. A name is resolved once and that very answer is connected to, so it cannot change in between.

The one exemption is ``exempt``: these hosts, at the port that stands beside them, and nothing else at that address.
Where they are looked up as well (``checked``), the answer must be that address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from curation.ingest.resolver import LookupFailedError, Resolver
from training.config import ConfigError

if TYPE_CHECKING:
    import ssl

    from aiohttp import TCPConnector
    from aiohttp.abc import ResolveResult

Contact = Callable[[str, int], None]

# Ports at which a web server may stand: these two, and those that need no privilege, without those of other protocols
# (the list of the Fetch standard, "block bad port").
_HTTPS_PORT = 443
_WEB_PORTS = (80, _HTTPS_PORT)
_BAD_PORTS = frozenset(
    (1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, *range(6665, 6670), 6679, 6697, 10080)
)
_NUMERIC = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)(\.(0[xX][0-9a-fA-F]*|[0-9]+)){0,3}\.?")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# What some version of Python calls global and is not; the first two hold services of clouds for their own machines.
_NEVER = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.0.0.0/24",
        "168.63.129.16/32",
        "192.88.99.0/24",
        "64:ff9b:1::/48",
        "2001::/23",
        "100::/64",
        "fec0::/10",
        "::/96",
        "5f00::/16",
        "3fff::/20",
    )
)
_REMEMBER_S = 300.0  # where a name led
_PROBE_S = 10.0

_target: ContextVar[tuple[str, int]] = ContextVar("target")
_peer: ContextVar[str | None] = ContextVar("peer", default=None)


class ForbiddenAddressError(Exception):
    """A connection that must not be made."""


def literal_address(host: str) -> str | None:
    """The address that a host is another way of writing, such as ``2130706433`` or ``0x7f.1``; None for names."""
    text = host.strip("[]")
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not _NUMERIC.fullmatch(text):
        return None
    try:
        return socket.inet_ntoa(socket.inet_aton(text.rstrip(".")))
    except OSError:
        return "0.0.0.0"  # digits that are no address: nothing that may be asked for


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, whatever it is wrapped in."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = _inside(ip)
        if inner is not None:
            return is_public(str(inner))
        if ip.scope_id is not None:
            return False
    if any(ip in network for network in _NEVER):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _inside(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for: mapped, 6to4, NAT64."""
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip.sixtofour is not None:
        return ip.sixtofour
    return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None


def is_web_port(port: int) -> bool:
    """Whether a web server may stand at a port."""
    return port in _WEB_PORTS or (port >= 1024 and port not in _BAD_PORTS)


class Guard:
    """Decides where connections may go, and makes the connector that asks it.

    ``exempt`` maps hosts to the one ``ADDRESS:PORT`` that stands for them; ``checked``: a look-up must agree.
    ``contact`` is told of every address before a socket to it exists, and may raise.
    """

    def __init__(
        self,
        exempt: Mapping[str, str],
        contact: Contact | None = None,
        *,
        resolver: Resolver | None = None,
        checked: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.exempt = {host.lower(): _pair(host, place) for host, place in exempt.items()}
        self.contact = contact
        self._checked = checked
        self.tls = tls
        self._resolver = Resolver() if resolver is None else resolver

    def exemption(self, host: str, port: int) -> tuple[str, int] | None:
        """Where an exempt host is connected to; None for all others, and at other ports."""
        pair = self.exempt.get(host.lower())
        return pair if pair is not None and port in (*_WEB_PORTS, pair[1]) else None

    def check(self, host: str, port: int) -> None:
        """Refuse what can be refused before a name is resolved.

        Raises:
            ForbiddenAddressError: no public address, an exempt host at another port, a port of no web server.
        """
        if self.exemption(host, port) is not None:
            return
        if host.lower() in self.exempt or not is_web_port(port):
            raise ForbiddenAddressError(f"{host}:{port}: not a port to ask for pictures")
        address = literal_address(host)
        if address is not None and not is_public(address):
            raise ForbiddenAddressError(f"{host}: {address} is not a public address")

    async def resolve(self, host: str, port: int, *, anew: bool = False) -> list[ResolveResult]:
        """Addresses of a host, all of them public; ``anew`` asks again for a name that was seen to fail.

        Raises:
            ForbiddenAddressError: one of its addresses is not public, or not the one that an exempt host stands at.
            OSError: the name does not resolve.
        """
        self.check(host, port)
        exempt = self.exemption(host, port)
        if exempt is not None:
            if self._checked and await self._resolver.addresses(host, anew=anew) != [exempt[0]]:
                raise ForbiddenAddressError(f"{host}: its name does not lead to {exempt[0]}, where it should stand")
            return [_result(host, *exempt)]
        address = literal_address(host)
        found = [address] if address is not None else await self._resolver.addresses(host, anew=anew)
        for address in found:
            if not is_public(address):
                raise ForbiddenAddressError(f"{host}: {address} is not a public address")
        return [_result(host, address, port) for address in found]

    async def is_there(self, host: str, port: int) -> bool:
        """Whether a host can be reached now: its name answers, and takes a connection, which is closed again.

        A resolver on the way may remember the name although it reaches nobody any more. So a name below it that cannot
        be known is asked for, too; to say that there is none is an answer.
        """
        try:
            async with asyncio.timeout(_PROBE_S):
                place = (await self.resolve(host, port, anew=True))[0]
                if literal_address(host) is None and (self._checked or self.exemption(host, port) is None):
                    await self._expect_answer(f"{uuid4().hex[:12]}.{host}")
                _target.set((host, port))
                address = (place["host"], place["port"])
                with self.socket_for((place["family"], socket.SOCK_STREAM, place["proto"], "", address)) as probe:
                    probe.setblocking(False)
                    loop = asyncio.get_running_loop()
                    await loop.sock_connect(probe, address)
                    if port == _HTTPS_PORT and self.tls is not None:
                        talk, _ = await loop.create_connection(
                            asyncio.Protocol, sock=probe, ssl=self.tls, server_hostname=host
                        )
                        talk.abort()
        except (OSError, ForbiddenAddressError):  # TimeoutError is an OSError, and so is what TLS raises
            return False
        return True

    async def _expect_answer(self, host: str) -> None:
        try:
            await self._resolver.addresses(host)
        except LookupFailedError as error:
            if not error.answered:
                raise

    def socket_for(self, address_info: Any) -> socket.socket:
        """The socket of a connection: the last door.

        Raises:
            ForbiddenAddressError: it would lead to an address that is not public.
        """
        family, kind, protocol, _, place = address_info
        address, port = str(place[0]), int(place[1])
        if (address, port) != self.exemption(*_target.get(("", 0))) and not is_public(address):
            raise ForbiddenAddressError(f"{address}:{port} is not a public address")
        if self.contact is not None:
            self.contact(address, port)
        return socket.socket(family, kind, protocol)

    def connector(self, *, limit: int) -> TCPConnector:
        """A connector for aiohttp that goes through this guard; to be made inside the running loop."""
        import aiohttp
        from aiohttp.abc import AbstractResolver

        guard = self

        class GuardedResolver(AbstractResolver):
            async def resolve(
                self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
            ) -> list[ResolveResult]:
                return await guard.resolve(host, port)

            async def close(self) -> None:
                pass

        class GuardedConnector(aiohttp.TCPConnector):
            async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
                host, port = req.url.raw_host or "", req.url.port or 0
                _peer.set(None)
                _target.set((host, port))
                guard.check(host, port)
                connection = await super().connect(req, traces, timeout)
                place = connection.transport.get_extra_info("peername") if connection.transport else None
                _peer.set(f"{place[0]}:{place[1]}" if place else None)
                return connection

        return GuardedConnector(
            resolver=GuardedResolver(),
            socket_factory=self.socket_for,
            ssl=True if guard.tls is None else guard.tls,
            limit=limit,
            ttl_dns_cache=int(_REMEMBER_S),
            keepalive_timeout=5.0,
        )


def last_peer() -> str | None:
    """``ip:port`` that the last request of this task was connected to; None where none was."""
    return _peer.get()


def forget_peer() -> None:
    """Before a request: nothing is connected yet."""
    _peer.set(None)


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return {
        "hostname": host,
        "host": address,
        "port": port,
        "family": family,
        "proto": socket.IPPROTO_TCP,
        "flags": socket.AI_NUMERICHOST,
    }


def _pair(host: str, place: str) -> tuple[str, int]:
    address, _, port = place.rpartition(":")
    try:
        return str(ipaddress.ip_address(address.strip("[]"))), int(port)
    except ValueError:
        raise ConfigError(f"fetch.resolve.{host}: {place!r} is no ADDRESS:PORT, such as 127.0.0.1:8080") from None
