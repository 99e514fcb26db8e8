"""One address to its bytes, or to the class of its failure: politely, within limits, and to public addresses only."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp

from curation.ingest.guard import ForbiddenAddressError, GuardedResolver, NameError_
from curation.ingest.robots import MAX_ROBOTS_BYTES, Rules, opt_out

TRANSIENT = ("dns", "connection", "timeout", "robots_unreachable", "rate_limited", "http_5xx", "truncated_body")
_BLOCK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)

_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"\xff\x0a", "jxl"),
    (b"\0\0\0\x0cJXL ", "jxl"),
)
_BRANDS = {b"avif": "avif", b"avis": "avif", b"heic": "heif", b"heix": "heif", b"mif1": "heif", b"msf1": "heif"}


def sniff(data: bytes) -> str | None:
    """Format of a picture by its first bytes; None where they are no picture's."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return _BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None


@dataclass(kw_only=True)
class Visit:
    """One request, for the log."""

    url: str
    attempt: int
    started_at: datetime
    elapsed_s: float = 0.0
    address: str | None = None
    http_status: int | None = None
    outcome: str = "ok"


@dataclass(kw_only=True)
class Outcome:
    """What came of an address."""

    reason: str | None = None  # failure class; None: ``body`` holds a picture
    body: bytes = b""
    format: str | None = None
    http_status: int | None = None
    final_url: str | None = None
    content_type: str | None = None
    robots: str | None = None
    opt_out: str | None = None
    visits: list[Visit] = field(default_factory=list)

    @property
    def transient(self) -> bool:
        """Whether the failure may pass with time."""
        return self.reason in TRANSIENT


class _FailedError(Exception):
    def __init__(self, reason: str, *, retry_after_s: float | None = None) -> None:
        self.reason = reason
        self.retry_after_s = retry_after_s
        super().__init__(reason)


class _Host:
    """What is known of a host: its rules, when it may be visited next, how many visits run."""

    def __init__(self, connections: int) -> None:
        self.limit = asyncio.Semaphore(connections)
        self.rules: asyncio.Future[Rules] | None = None
        self.next_at = 0.0
        self.delay_s = 0.0


class Fetcher:
    """Fetches many addresses; ``config`` is a ``FetchConfig``."""

    def __init__(self, config: Any, *, resolver: GuardedResolver | None = None) -> None:
        self._config = config
        self._given_resolver = resolver
        self._hosts: dict[str, _Host] = {}

    async def __aenter__(self) -> Fetcher:
        config = self._config
        self._resolver = self._given_resolver or GuardedResolver(config.resolve)
        connector = aiohttp.TCPConnector(
            resolver=self._resolver, limit=config.concurrency, use_dns_cache=False, enable_cleanup_closed=True
        )
        contact = f" (+{config.contact})" if config.contact else ""
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": f"{config.agent}/1.0{contact}", "Accept": "image/*", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            max_line_size=16_384,
            max_field_size=16_384,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> Outcome:
        """Bytes of one address, or why there are none. Never raises for what a server does."""
        outcome = Outcome()
        url = url.strip()
        for attempt in range(1, self._config.attempts + 1):
            try:
                await self._attempt(url, attempt, outcome)
                outcome.reason = None
            except _FailedError as failure:
                outcome.reason = failure.reason
                wait_s = self._wait_s(url, attempt, failure)
                if wait_s is None:
                    return outcome
                await asyncio.sleep(wait_s)
                continue
            return outcome
        return outcome

    def _wait_s(self, url: str, attempt: int, failure: _FailedError) -> float | None:
        """Seconds until the next attempt; None where there is none."""
        config = self._config
        if failure.reason not in TRANSIENT or attempt >= config.attempts:
            return None
        if failure.reason in ("timeout", "truncated_body", "robots_unreachable") and attempt >= 2:
            return None
        if failure.retry_after_s is not None:
            return failure.retry_after_s if failure.retry_after_s <= config.max_retry_after_s else None
        jitter = int.from_bytes(hashlib.sha256(f"{attempt}|{url}".encode()).digest()[:4], "big") / 2**32
        return float(config.backoff_s * 2 ** (attempt - 1) * (0.5 + jitter))

    async def _attempt(self, url: str, attempt: int, outcome: Outcome) -> None:
        """Follow redirects by hand, so that every hop is judged."""
        seen = set()
        for _ in range(self._config.max_redirects + 1):
            if url in seen:
                raise _FailedError("too_many_redirects")
            seen.add(url)
            parts = urlsplit(url)
            if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
                raise _FailedError("bad_url")
            await self._check_robots(url, attempt, outcome)
            location = await self._visit(url, attempt, outcome)
            if location is None:
                return
            url = urljoin(url, location)
        raise _FailedError("too_many_redirects")

    async def _visit(self, url: str, attempt: int, outcome: Outcome) -> str | None:
        """One request; where it leads on to, None where it ended here."""
        visit = Visit(url=url, attempt=attempt, started_at=datetime.now(UTC))
        outcome.visits.append(visit)
        host = self._host(url)
        async with host.limit:
            await self._keep_distance(host)
            started = time.monotonic()
            try:
                return await self._request(url, visit, outcome)
            except _FailedError as failure:
                visit.outcome = failure.reason
                raise
            finally:
                visit.elapsed_s = time.monotonic() - started

    async def _request(self, url: str, visit: Visit, outcome: Outcome) -> str | None:
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s, connect=self._config.connect_timeout_s)
        try:
            parts = urlsplit(url)
            self._resolver.check_literal(parts.hostname or "", parts.port or 80)
            async with self._session.get(url, allow_redirects=False, timeout=timeout) as response:
                visit.http_status = outcome.http_status = response.status
                visit.address = _peer(response)
                outcome.final_url = url
                outcome.content_type = response.headers.get("Content-Type")
                if response.status in _REDIRECTS and "Location" in response.headers:
                    visit.outcome = "redirect"
                    return str(response.headers["Location"])
                self._judge_headers(response, outcome)
                outcome.body = await self._body(response)
        except Exception as error:
            raise _failure_of(error) from None
        outcome.format = sniff(outcome.body)
        if outcome.format is None:
            outcome.body = b""
            raise _FailedError("not_an_image")
        return None

    def _judge_headers(self, response: Any, outcome: Outcome) -> None:
        status = response.status
        if status in (429, 503):
            raise _FailedError(
                "rate_limited" if status == 429 else "http_5xx", retry_after_s=_retry_after(response.headers)
            )
        if status >= 400:
            raise _FailedError("http_4xx" if status < 500 else "http_5xx")
        if status != 200:
            raise _FailedError("http_4xx")
        if self._config.respect_opt_out:
            outcome.opt_out = opt_out(response.headers, agent=self._config.agent)
            if outcome.opt_out is not None:
                raise _FailedError("opt_out")
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > self._config.max_bytes:
            raise _FailedError("too_large")

    async def _body(self, response: Any) -> bytes:
        blocks, size = [], 0
        async for block in response.content.iter_chunked(_BLOCK_BYTES):
            blocks.append(block)
            size += len(block)
            if size > self._config.max_bytes:
                raise _FailedError("too_large")
        return b"".join(blocks)

    # Robots and pace

    def _host(self, url: str) -> _Host:
        parts = urlsplit(url)
        key = f"{parts.scheme.lower()}://{(parts.netloc or '').lower()}"
        if key not in self._hosts:
            self._hosts[key] = _Host(self._config.per_host)
        return self._hosts[key]

    async def _keep_distance(self, host: _Host) -> None:
        interval = max(self._config.per_host_interval_s, host.delay_s)
        now = time.monotonic()
        start = max(now, host.next_at)
        host.next_at = start + interval
        if start > now:
            await asyncio.sleep(start - now)

    async def _check_robots(self, url: str, attempt: int, outcome: Outcome) -> None:
        if not self._config.respect_robots:
            return
        host = self._host(url)
        if host.rules is None or (host.rules.done() and host.rules.exception() is not None and attempt > 1):
            host.rules = asyncio.ensure_future(self._rules(url, attempt, outcome))
        try:
            rules = await asyncio.shield(host.rules)
        except _FailedError as failure:
            outcome.robots = "unreachable"
            raise _FailedError(failure.reason) from None
        host.delay_s = min(rules.delay_s(), self._config.max_crawl_delay_s)
        allowed = rules.allows(url)
        outcome.robots = rules.told if allowed else "denied"
        if not allowed:
            raise _FailedError("robots_denied")

    async def _rules(self, url: str, attempt: int, outcome: Outcome) -> Rules:
        """robots.txt of the site of an address: 4xx means no rules, 5xx and timeouts that we must not go on."""
        place = urljoin(url, "/robots.txt")
        agent = self._config.agent
        for _ in range(self._config.max_redirects + 1):
            visit = Visit(url=place, attempt=attempt, started_at=datetime.now(UTC))
            outcome.visits.append(visit)
            started = time.monotonic()
            try:
                found = await self._robots_request(place, visit)
            except Exception as error:
                failure = _failure_of(error)
                kept = ("dns", "connection", "forbidden_address", "bad_url")
                visit.outcome = failure.reason if failure.reason in kept else "robots_unreachable"
                raise _FailedError(visit.outcome) from None
            finally:
                visit.elapsed_s = time.monotonic() - started
            if isinstance(found, str) and visit.outcome == "redirect":
                place = urljoin(place, found)
                continue
            return Rules(found, agent=agent)
        return Rules(None, agent=agent)  # RFC 9309 2.3.1.2: too many hops count as no rules

    async def _robots_request(self, place: str, visit: Visit) -> str | None:
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s, connect=self._config.connect_timeout_s)
        parts = urlsplit(place)
        if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
            raise _FailedError("bad_url")
        self._resolver.check_literal(parts.hostname, parts.port or 80)
        async with self._session.get(place, allow_redirects=False, timeout=timeout) as response:
            visit.http_status, visit.address = response.status, _peer(response)
            if response.status in _REDIRECTS and "Location" in response.headers:
                visit.outcome = "redirect"
                return str(response.headers["Location"])
            if response.status >= 500:
                raise _FailedError("robots_unreachable")
            if response.status >= 400:
                return None
            text = b""
            async for block in response.content.iter_chunked(_BLOCK_BYTES):
                text += block
                if len(text) > MAX_ROBOTS_BYTES:
                    break
            return text[:MAX_ROBOTS_BYTES].decode("utf-8", "replace")


def _failure_of(error: Exception) -> _FailedError:
    """The failure class of an exception."""
    if isinstance(error, _FailedError):
        return error
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = getattr(cause, "os_error", None) or cause.__cause__ or cause.__context__
    if any(isinstance(link, ForbiddenAddressError) for link in chain):
        return _FailedError("forbidden_address")
    if any(isinstance(link, NameError_) for link in chain):
        return _FailedError("dns")
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return _FailedError("timeout")
    if isinstance(error, aiohttp.ClientPayloadError):
        return _FailedError("truncated_body")
    if isinstance(error, (aiohttp.InvalidURL, UnicodeError, ValueError)):
        return _FailedError("bad_url")
    return _FailedError("connection")


def _peer(response: Any) -> str | None:
    connection = response.connection
    peer = connection.transport.get_extra_info("peername") if connection and connection.transport else None
    return f"{peer[0]}:{peer[1]}" if peer else None


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait; None where it does not say."""
    value = str(headers.get("Retry-After", "")).strip()
    if value.isdigit():
        return float(value)
    if not value:
        return None
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
