"""Addresses: what is wrong with one, its host, and the one spelling under which equal addresses are equal."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}
_ASCII_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.-])?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
# An address as most are written; ``_parse`` takes it apart the same way.
_PLAIN = re.compile(r"(https?)://([a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_-])?)(/[!\"$->@-~]*)(?:\?([!\"$-~]*))?(?:#[!-~]*)?")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


class AddressError(ValueError):
    """The text is no address; the message says why in a few words."""


class Address(NamedTuple):
    """An address in parts, scheme and host in their one spelling."""

    scheme: str
    userinfo: str
    host: str  # lower case, IDNA; an IPv6 address without brackets; empty for schemes without hosts
    port: int | None  # None: the scheme's own
    path: str
    query: str | None


def parse_address(url: str) -> Address:
    """Split an address.

    Raises:
        AddressError: no scheme, no host where the scheme has one, a port that is none, control characters.
    """
    plain = _PLAIN.fullmatch(url)
    if plain is None:
        return _parse(url)
    scheme, host, path, query = plain.groups()
    return Address(scheme, "", host, None, path, query)


def _parse(url: str) -> Address:
    text = url.strip()
    if not text:
        raise AddressError("empty line")
    if _CONTROL.search(text):
        raise AddressError("control character")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise AddressError(f"no address: {error}") from None
    scheme = parts.scheme.lower()
    if not scheme:
        raise AddressError("no scheme")
    if scheme not in _DEFAULT_PORTS:
        return Address(scheme, "", (parts.hostname or "").lower(), port, parts.path, parts.query or None)
    host = _plain_host(parts.hostname or "")
    userinfo = parts.netloc.rpartition("@")[0]
    query = parts.query if "?" in text.partition("#")[0] else None
    return Address(scheme, userinfo, host, None if port == _DEFAULT_PORTS[scheme] else port, parts.path, query)


def address_error(url: str) -> str | None:
    """Why a text is no address; None where it is one."""
    try:
        parse_address(url)
    except AddressError as error:
        return str(error)
    return None


def canonical_url(url: str) -> str:
    """The spelling under which equal addresses are equal (RFC 3986, section 6.2.2 and 6.2.3).

    Scheme and host in lower case, IDNA, no default port, no fragment, dot segments gone, escapes of the path normal.
    The query stays as it is: servers tell more apart there than the standard does.

    Raises:
        AddressError: the text is no address.
    """
    address = parse_address(url)
    if address.scheme not in _DEFAULT_PORTS:
        return url.strip()
    host = f"[{address.host}]" if ":" in address.host else address.host
    authority = f"{address.userinfo}@{host}" if address.userinfo else host
    if address.port is not None:
        authority += f":{address.port}"
    query = "" if address.query is None else f"?{address.query}"
    return f"{address.scheme}://{authority}{_plain_path(address.path)}{query}"


def _plain_host(host: str) -> str:
    host = host.lower()
    if ":" in host:  # an IPv6 address: urlsplit has checked its brackets
        return host
    if not host.isascii():
        import idna

        try:
            host = idna.encode(host, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise AddressError("a host that cannot be") from None
    host = host.removesuffix(".")  # only now: IDNA makes dots of others (U+3002, U+FF0E, U+FF61)
    if not host:
        raise AddressError("no host")
    if not _ASCII_HOST.fullmatch(host):
        raise AddressError("a host that cannot be")
    return host


def _plain_path(path: str) -> str:
    def plain_escape(match: re.Match[str]) -> str:
        char = chr(int(match[0][1:], 16))
        return char if char in _UNRESERVED else match[0].upper()

    path = _ESCAPE.sub(plain_escape, path)
    path = quote(path, safe="/%:@!$&'()*+,;=-._~")
    kept: list[str] = []
    segments = path.split("/")[1:]
    for place, segment in enumerate(segments):
        last = place == len(segments) - 1
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
        if last and segment in (".", ".."):
            kept.append("")
    return "/" + "/".join(kept)
