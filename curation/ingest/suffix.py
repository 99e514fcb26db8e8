"""Public suffixes: below which names anybody may register one, and so which hosts are of one owner.

The Public Suffix List (publicsuffix.org) as ``tldextract`` brings it along, its private section too: two users of
``github.io`` are two owners. Nothing is asked over the network, and nothing is kept on disk: with one version of the
library a host has one answer.
"""

from __future__ import annotations

import ipaddress
from functools import cache, lru_cache
from typing import Any


def is_public_suffix(name: str) -> bool:
    """Whether the list has a name: com, co.uk, github.io; not a top-level domain that the list does not know.

    Args:
        name: in lower case, IDNA or any alphabet, without a dot at its end.
    """
    if "." not in name:  # of ck the list has rules for the names below it only
        return bool(_list()(f"x.{name}").suffix)
    found = _list()(name)
    return bool(found.suffix) and not found.domain


@lru_cache(maxsize=65_536)  # links of one page lead to few hosts
def registrable_domain(host: str) -> str:
    """The name that somebody registered: example.co.uk of www.example.co.uk. Hosts that share it are of one owner.

    Below a top-level domain that the list does not know it is two labels, as the list's rule ``*`` says. What has none
    stands for itself alone: an IP address, a single label, a public suffix.

    Args:
        host: as ``parse_address`` gives it, lower case, IDNA, an IPv6 address without brackets; a dot at its end is of
            no matter.
    """
    host = host.removesuffix(".")
    if _is_ip(host):
        return host
    found = _list()(host)
    if found.suffix:
        return f"{found.domain}.{found.suffix}" if found.domain else host
    return ".".join(host.split(".")[-2:])


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@cache
def _list() -> Any:
    import tldextract

    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None, include_psl_private_domains=True)
