"""What comes of an address: its end, the visits on the way, and why it ended so."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import ClientResponse

# Failures that may pass with time: what ``lvd curate --retry transient`` fetches again.
TRANSIENT = (
    "dns",
    "connection",
    "bad_certificate",
    "timeout",
    "robots_unreachable",
    "rate_limited",
    "http_5xx",
    "truncated_body",
    "host_busy",
)
# All others: what the address is, what the site wants, what came.
PERMANENT = (
    "bad_url",
    "forbidden_address",
    "blocked_host",
    "blocked_url",
    "robots_denied",
    "crawl_delay",
    "opt_out",
    "http_4xx",
    "too_many_redirects",
    "too_large",
    "not_an_image",
)
PIECE_BYTES = 1 << 16  # of a body, read at once
# Headers that are kept of an answer: they decided what was done with it, or tell later whether it changed.
_TOLD = (
    "Content-Type",
    "Content-Length",
    "Content-Encoding",
    "Content-Range",
    "Location",
    "Retry-After",
    "X-Robots-Tag",
    "TDM-Reservation",
    "TDM-Policy",
    "ETag",
    "Last-Modified",
)
_TOLD_CHARS = 500
_RANGE = re.compile(r"bytes\s+0-(?P<last>\d{1,18})/(?P<size>\d{1,18})", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One visit to a server: a row of ``fetch_log`` but for the id."""

    attempt: int
    started_at: datetime
    elapsed_s: float
    url: str
    address: str | None
    http_status: int | None
    outcome: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of an address: a row of ``images``, and the bytes where there are any."""

    body: bytes | None = None
    reason: str | None = None
    http_status: int | None = None
    final_url: str | None = None
    content_type: str | None = None
    robots: str | None = None
    opt_out: str | None = None
    format: str | None = None
    nofollow: bool = False
    hops: tuple[Hop, ...] = ()

    @property
    def transient(self) -> bool:
        """Whether the failure may pass with time."""
        return self.reason in TRANSIENT


@dataclass(kw_only=True)
class Answer:
    """What came of one hop."""

    reason: str | None = None
    status: int | None = None
    location: str | None = None  # of a redirect
    content_type: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    opt_out: str | None = None
    body: bytes | None = None
    format: str | None = None
    nofollow: bool = False  # of a page: its headers say that links on it should not be followed
    wait_s: float | None = None  # that the server asks for
    again: bool = False  # worth another attempt now
    started: bool = False  # headers have come


@dataclass(kw_only=True)
class Trail:
    """The hops of one address, and the number of the attempt."""

    attempt: int = 1
    hops: list[Hop] = field(default_factory=list)


def coding_of(response: ClientResponse) -> str:
    """All of Content-Encoding; ``identity`` where there is none."""
    return ", ".join(response.headers.getall("Content-Encoding", ())).strip().lower() or "identity"


def is_whole(response: ClientResponse) -> bool:
    """Whether the part that a 206 says it is of is all of it."""
    said = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    return said is not None and int(said["last"]) + 1 == int(said["size"])


def told(response: ClientResponse) -> tuple[tuple[str, str], ...]:
    """The headers that are kept, in lower case, with their values."""
    found = []
    for name in _TOLD:
        if name in response.headers:
            text = header_text(", ".join(response.headers.getall(name))) or ""
            found.append((name.lower(), text[:_TOLD_CHARS]))
    return tuple(found)


def header_text(header: str | None) -> str | None:
    """A header as valid text; servers send any bytes."""
    return None if header is None else header.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
