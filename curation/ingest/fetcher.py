"""One address in, one outcome out: bytes, or a failure class.

Redirects are followed here, hop by hop, so that robots.txt and the guard see each of them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from curation.ingest import robots
from curation.ingest.body import CODINGS, PictureBody, unpacked_start
from curation.ingest.breaker import Reached
from curation.ingest.certificates import tls_context
from curation.ingest.guard import Contact, ForbiddenAddressError, Guard, forget_peer, last_peer
from curation.ingest.outcome import PIECE_BYTES, Answer, Hop, Outcome, Trail, coding_of, header_text, is_whole, told
from curation.ingest.pace import HostPace, Key, Pause, backoff_s, keep_pauses, retry_after_s
from curation.ingest.resolver import NUM_LOOKUPS, LookupFailedError, Resolver
from curation.ingest.takedown import TAKEN_DOWN
from curation.ingest.takedown import Rules as Takedowns

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from yarl import URL

    from curation.ingest.fetch import FetchConfig

# Failures that end a visit at its second attempt: each costs a whole time limit, or most of a body.
_TRIED_TWICE = ("timeout", "truncated_body")
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_ROBOTS_REDIRECTS = 5

Read = Callable[[Any, Answer], Awaitable[None]]
Refuses = Callable[[str], str | None]


class Fetcher:
    """Fetches addresses of pictures inside one event loop.

    Args:
        config: of the stage.
        rules: outlives the loop, so that robots.txt is not asked for twice.
        contact: is told of every address before a socket to it exists, and may raise.
        taken_down: addresses that are not asked for.
        refuses: why an address, or one that is redirected to, must not be asked for; None where it may.
        reached: is told which hosts answer.
        pauses: of hosts that were asked in an earlier loop; they are kept there for the next one.
        scratch: folder for large bodies that are under way.
    """

    accept = "image/*,*/*;q=0.5"

    def __init__(
        self,
        config: FetchConfig,
        *,
        rules: dict[str, robots.Rules] | None = None,
        contact: Contact | None = None,
        taken_down: Takedowns | None = None,
        refuses: Refuses = lambda url: None,
        reached: Reached | None = None,
        pauses: dict[Key, Pause] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.config = config
        self._taken_down = Takedowns([]) if taken_down is None else taken_down
        self._refuses = refuses
        self._reached = Reached() if reached is None else reached
        self._scratch = scratch
        self._resolver = Resolver(config.nameservers, self._reached.named)
        self._guard = Guard(
            config.resolve,
            contact,
            resolver=self._resolver,
            checked=config.resolve_checked,
            tls=tls_context(verify=config.verify_certificates),
        )
        self.is_there = self._guard.is_there
        self.calm = asyncio.Event()  # cleared by whoever wants no request to go out
        self.calm.set()
        self._robots = robots.Robots(self._get_robots, {} if rules is None else rules, config.agent)
        self._hosts: dict[Key, HostPace] = {}
        self._pauses = {} if pauses is None else pauses
        self._slots = asyncio.Semaphore(config.concurrency)

    async def __aenter__(self) -> Self:
        import aiohttp

        # The system's look-ups take a thread each, and the loop's own pool is as small as the machine.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(NUM_LOOKUPS, "lookup"))
        self._session = aiohttp.ClientSession(
            connector=self._guard.connector(limit=self.config.concurrency),
            cookie_jar=aiohttp.DummyCookieJar(),  # what one answer sets must not change another
            timeout=aiohttp.ClientTimeout(total=None),
            headers={
                "User-Agent": self.config.user_agent,
                "Accept": self.accept,
                "Accept-Encoding": "identity",
            },
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep_pauses(self._pauses, self._hosts)
        await self._robots.close()
        await self._session.close()
        await self._resolver.close()

    async def fetch(self, url: str) -> Outcome:
        """Fetch one address; every failure is an outcome, none is raised."""
        trail = Trail()
        for attempt in range(1, self.config.attempts + 1):
            trail.attempt = attempt
            outcome, answer = await self._follow(url, trail)
            if not self._may_try_again(answer, attempt):
                break
            await asyncio.sleep(self._wait_s(url, answer, attempt))
        return replace(outcome, hops=tuple(trail.hops))

    def _may_try_again(self, answer: Answer, attempt: int) -> bool:
        attempts = self.config.attempts
        return answer.again and attempt < (min(attempts, 2) if answer.reason in _TRIED_TWICE else attempts)

    def _wait_s(self, url: str, answer: Answer, attempt: int) -> float:
        return backoff_s(url, attempt, self.config.backoff_s) if answer.wait_s is None else answer.wait_s

    async def _follow(self, url: str, trail: Trail) -> tuple[Outcome, Answer]:
        """One attempt: the address and where it redirects to."""
        state: str | None = None
        place = _place(url.strip())
        if place is None:
            return Outcome(reason="bad_url", final_url=url), Answer()
        for _ in range(self.config.max_redirects + 1):
            if place.scheme not in ("http", "https") or not place.raw_host:
                return Outcome(reason="bad_url", final_url=str(place), robots=state), Answer()
            state, failure = await self._may_fetch(place, trail)
            if failure is not None:
                return Outcome(reason=failure, final_url=str(place), robots=state), Answer()
            answer = await self._hop(place, trail, self._read_body)
            if answer.location is None:
                outcome = Outcome(
                    body=answer.body,
                    reason=answer.reason,
                    http_status=answer.status,
                    final_url=str(place),
                    content_type=answer.content_type,
                    robots=state,
                    opt_out=answer.opt_out,
                    format=answer.format,
                    nofollow=answer.nofollow,
                )
                return outcome, answer
            target = _place(answer.location, place)
            if target is None:
                return Outcome(reason="bad_url", http_status=answer.status, robots=state), Answer()
            place = target
        last = Outcome(reason="too_many_redirects", http_status=answer.status, final_url=str(place), robots=state)
        return last, Answer()

    # robots.txt

    async def _may_fetch(self, place: URL, trail: Trail) -> tuple[str | None, str | None]:
        """State of robots.txt for an address, and the failure class where it may not be fetched.

        ``trail`` says how it was come to, which decides nothing where any picture is as good as another.
        """
        del trail
        refused = TAKEN_DOWN if self._taken_down.url(str(place)) else self._refuses(str(place))
        if refused is not None or not self.config.respect_robots:
            return None, refused
        rules = await self._robots.rules(str(place.origin()))
        if rules.failure is not None:
            return rules.state, rules.failure
        state = rules.judge(str(place))
        if state == "denied":
            return state, "robots_denied"
        delay_s = rules.delay_s()
        if delay_s > self.config.max_crawl_delay_s:
            return state, "crawl_delay"
        if delay_s:
            self._host(place).slow_down(delay_s)
        return state, None

    async def _get_robots(self, url: str) -> robots.Reply:
        from yarl import URL

        place = URL(url)
        attempt, redirects = 1, 0
        while True:
            answer = await self._hop(place, None, self._read_robots)
            if answer.location is not None:
                redirects += 1
                if redirects > _MAX_ROBOTS_REDIRECTS:
                    return robots.Reply(404, b"")  # RFC 9309, section 2.3.1.2: as if there were none
                target = _place(answer.location, place)
                if target is None or target.scheme not in ("http", "https") or not target.raw_host:
                    return robots.Reply(404, b"")
                place = target
            elif self._may_try_again(answer, attempt):
                await asyncio.sleep(self._wait_s(url, answer, attempt))
                attempt += 1
            else:
                # A status says more than the reason that a picture would have got for it.
                failure = answer.reason if answer.status is None or answer.status in range(200, 300) else None
                return robots.Reply(answer.status or 0, answer.body or b"", failure)

    # One hop

    def forget_failures(self) -> None:
        """What failed did so in an outage that has passed: names are looked up again, and no host is left alone."""
        self._resolver.forget_failures()
        self.renew_patience()

    def renew_patience(self) -> None:
        """Further addresses, for which each host has all the time again; when it may be asked next stays as it is."""
        for host in self._hosts.values():
            host.renew_patience()

    def _host(self, place: URL) -> HostPace:
        # Who asks is of no matter, nor is the scheme: http and https at the port that is their own are one server.
        key = (place.raw_host, None if place.is_default_port() else place.explicit_port)
        if key not in self._hosts:
            config = self.config
            self._hosts[key] = HostPace(
                connections=config.per_host,
                interval_s=config.per_host_interval_s,
                patience_s=config.per_host_patience_s,
                pause=self._pauses.get(key),
            )
        return self._hosts[key]

    @asynccontextmanager
    async def _ready(self) -> AsyncIterator[None]:
        """A place among all requests of this worker, when any may go out."""
        async with self._slots:
            await self.calm.wait()
            yield

    async def _hop(self, place: URL, trail: Trail | None, read: Read) -> Answer:
        """Ask a server once. The time limit begins when the request may go out, not while others are ahead."""
        host = self._host(place)
        answer = Answer()
        async with host.turn(self._ready) as closed:
            if closed is not None:
                status, content_type = host.refusal if closed == "rate_limited" else (None, None)
                return Answer(reason=closed, status=status, content_type=content_type)
            started_at, started = datetime.now(UTC), time.perf_counter()
            forget_peer()
            await self._ask(place, answer, read)
            if answer.reason == "rate_limited":
                attempt = 1 if trail is None else trail.attempt
                if self._may_try_again(answer, attempt):
                    wait_s = self._wait_s(str(place), answer, attempt)
                    host.postponed(wait_s, answer.status, answer.content_type)
                else:
                    host.refused(answer.wait_s, answer.status, answer.content_type)
            elif answer.reason in ("connection", "timeout") or (answer.reason == "dns" and answer.again):
                host.failed(answer.reason)
            elif answer.started:
                host.answered()
        if trail is not None:
            hop = Hop(
                attempt=trail.attempt,
                started_at=started_at,
                elapsed_s=time.perf_counter() - started,
                url=str(place),
                address=last_peer(),
                http_status=answer.status,
                outcome=answer.reason or ("ok" if answer.location is None else "redirect"),
                headers=answer.headers,
            )
            trail.hops.append(hop)
        return answer

    async def _ask(self, place: URL, answer: Answer, read: Read) -> None:
        """Request and read, and put a name to whatever goes wrong."""
        import aiohttp

        try:
            async with (
                asyncio.timeout(self.config.timeout_s),
                self._session.get(place, allow_redirects=False) as response,
            ):
                answer.started = True
                self._reached.answered(place.raw_host or "", place.port or 0)
                answer.status = response.status
                answer.headers = told(response)
                answer.content_type = header_text(response.headers.get("Content-Type"))
                self._judge_status(response, answer)
                if answer.reason is None and answer.location is None:
                    await read(response, answer)
                # A body that was not read to its end closes the connection: nothing more of it comes.
        except TimeoutError:
            answer.reason = "timeout"
            answer.again = not answer.started  # a body that drips would drip again
        except ForbiddenAddressError:
            answer.reason = "forbidden_address"
        except aiohttp.ClientConnectorDNSError as error:
            answer.reason = "dns"
            answer.again = isinstance(error.os_error, LookupFailedError) and error.os_error.again
        except aiohttp.ClientConnectorCertificateError:
            answer.reason = "bad_certificate"
        except aiohttp.InvalidURL:
            answer.reason = "bad_url"
        except (aiohttp.ClientError, OSError):
            answer.reason = "truncated_body" if answer.started else "connection"
            answer.again = True
        except ValueError:
            answer.reason = "bad_url"

    def _judge_status(self, response: ClientResponse, answer: Answer) -> None:
        """What a status means before any of the body is read."""
        status = response.status
        if status in _REDIRECTS and "Location" in response.headers:
            answer.location = response.headers["Location"]
        elif status == 429 or (status == 503 and "Retry-After" in response.headers):
            answer.reason = "rate_limited"
            answer.wait_s = retry_after_s(response.headers.get("Retry-After"))
            answer.again = answer.wait_s is None or answer.wait_s <= self.config.max_retry_after_s
        elif status >= 500:
            answer.reason, answer.again = "http_5xx", True
        elif status >= 400:
            answer.reason, answer.again = "http_4xx", status in (408, 425)
        elif not 200 <= status < 300:
            answer.reason = "not_an_image"
        elif status == 206 and not is_whole(response):  # no part was asked for
            answer.reason, answer.again = "truncated_body", True

    async def _read_body(self, response: ClientResponse, answer: Answer) -> None:
        """Headers first, then the body, no further than it looks like a picture and fits."""
        if self.config.respect_opt_out:
            answer.opt_out = robots.opt_out(response.headers.items(), self.config.agent)
            if answer.opt_out is not None:
                answer.reason = "opt_out"
                return
        limit = self.config.max_bytes
        coding = coding_of(response)
        if response.content_length is not None and response.content_length > limit:
            answer.reason = "too_large"
            return
        if coding != "identity" and coding not in CODINGS:
            answer.reason = "not_an_image"
            return
        with PictureBody(coding, limit, self._scratch) as body:
            async for piece in response.content.iter_chunked(PIECE_BYTES):
                answer.reason = body.add(piece)
                if answer.reason is not None:
                    return
            if body.is_cut:
                answer.reason, answer.again = "truncated_body", True
                return
            picture = body.end()
        if picture is None:
            answer.reason = "not_an_image"
        else:
            answer.format, answer.body = picture

    async def _read_robots(self, response: ClientResponse, answer: Answer) -> None:
        """The first bytes of robots.txt; the rest is not read. What cannot be unpacked allows nothing."""
        limit = robots.MAX_ROBOTS_BYTES
        body = bytearray()
        async for piece in response.content.iter_chunked(PIECE_BYTES):
            body += piece
            if len(body) >= limit:
                break
        try:
            text, whole = unpacked_start(bytes(body), coding_of(response), limit)
        except zlib.error:
            answer.reason = "robots_unreachable"
            return
        if whole or len(body) >= limit or len(text) >= limit:
            answer.body = text
        else:
            answer.reason = "robots_unreachable"


def _place(text: str, base: URL | None = None) -> URL | None:
    """An address, or where a redirect from ``base`` leads; None for what is none."""
    from yarl import URL

    try:
        place = URL(text) if base is None else base.join(URL(text)).with_fragment(None)
        host, _ = place.raw_host or "", place.port  # looked at only now, and again later
        if ":" in host:  # yarl takes `http://[64:ff9b:]/`, and forgets its brackets
            ipaddress.IPv6Address(host)
    except (ValueError, IndexError):  # yarl trips over `http://[x]@/`
        return None
    return place
