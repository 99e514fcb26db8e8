"""Pace: how often and how many at once one host is asked, and how long to wait after it said no."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

_REFUSALS = 5  # for longer than is waited for, or of rows that had all their attempts
_POSTPONEMENTS = 20  # one after another, of whatever length
_FAILURES = 10

_REFUSED_S = 300.0  # that a host which refuses is left alone, where it does not say for how long
_MAX_PAUSES = 20_000

Ready = Callable[[], AbstractAsyncContextManager[None]]
Key = tuple[str | None, int | None]  # host, and port where it is not the scheme's own


class Pause(NamedTuple):
    """What a host may expect of whoever asks it next: in time.monotonic(), which is a loop's time as well."""

    next_at: float
    refused_until: float
    refusal: tuple[int | None, str | None]


class HostPace:
    """One host: a number of connections, a least time between requests, and patience that ends.

    Patience ends with refusals or failures one after another, and with the time that the host may take in all: a host
    that drips, or asks for long pauses, must not keep all others waiting.

    Args:
        connections: at once.
        interval_s: least time between requests.
        patience_s: time that the host may take in all.
        pause: of an earlier event loop.
    """

    def __init__(self, *, connections: int, interval_s: float, patience_s: float, pause: Pause | None = None) -> None:
        self.interval_s = interval_s
        self._connections = asyncio.Semaphore(connections)
        self._patience_s = patience_s
        self._ends_at: float | None = None  # loop time
        self._next_at = 0.0  # loop time
        self._refusals = 0
        self._postponements = 0
        self._failures = 0
        self._failure = ""
        # Status and content type of the last one: what is not asked any more would have got the same.
        self.refusal: tuple[int | None, str | None] = (None, None)
        self._refused_until = 0.0
        if pause is not None:
            self._next_at, self._refused_until, self.refusal = pause
            self._refusals = _REFUSALS if self._refused_until > time.monotonic() else 0

    def pause(self) -> Pause | None:
        """What is to be kept for the next loop; None where the host may be asked at once."""
        refused_until = self._refused_until if self._refusals >= _REFUSALS else 0.0
        kept = Pause(self._next_at, refused_until, self.refusal)
        return kept if max(self._next_at, refused_until) > time.monotonic() else None

    @asynccontextmanager
    async def turn(self, ready: Ready = nullcontext) -> AsyncIterator[str | None]:
        """Wait until a request may go out. Where the host is left alone: why, at once.

        Args:
            ready: what all hosts wait for together, such as a place among all requests. It is waited for when the
                host's own time has come, and given back when that passed to another request meanwhile: time between
                requests is time between those that go out, and nobody who waits for a host keeps others waiting.
        """
        clock = asyncio.get_running_loop().time
        async with self._connections:
            now = clock()
            if self._ends_at is None:
                self._ends_at = now + self._patience_s
            while (closed := self._closed(now)) is None:
                if (wait_s := self._next_at - now) > 0:
                    await asyncio.sleep(wait_s)
                    now = clock()
                    continue
                async with ready():
                    closed = self._closed(now)  # as of then: that all hosts wait does not cost this one its patience
                    now = clock()
                    if closed is None and self._next_at > now:
                        continue
                    if closed is None:
                        self._next_at = now + self.interval_s
                    yield closed
                    return
            yield closed

    def renew_patience(self) -> None:
        """Patience is as at the start."""
        self._ends_at = None
        self._refusals = self._postponements = self._failures = 0

    def slow_down(self, interval_s: float) -> None:
        """Keep at least this time between requests, as robots.txt asks."""
        self.interval_s = max(self.interval_s, interval_s)

    def postponed(self, wait_s: float, status: int | None, content_type: str | None) -> None:
        """The host said: not before ``wait_s`` seconds have passed."""
        self._postponements += 1
        self.refusal = (status, content_type)
        self._next_at = max(self._next_at, asyncio.get_running_loop().time() + wait_s)

    def refused(self, wait_s: float | None, status: int | None, content_type: str | None) -> None:
        """The host said: not for a long time."""
        self._refusals += 1
        self.refusal = (status, content_type)
        until = time.monotonic() + (_REFUSED_S if wait_s is None else wait_s)
        self._refused_until = max(self._refused_until, until)

    def failed(self, failure: str) -> None:
        """The host took no connection, or did not end its answer in time."""
        self._failures += 1
        self._failure = failure

    def answered(self) -> None:
        """The host answered."""
        self._refusals = 0
        self._postponements = 0
        self._failures = 0

    def _closed(self, now: float) -> str | None:
        """The failure class of all further requests where the host is left alone; None where it is not."""
        if self._refusals >= _REFUSALS or self._postponements >= _POSTPONEMENTS:
            return "rate_limited"
        if self._failures >= _FAILURES:
            return self._failure
        return "host_busy" if self._ends_at is not None and max(self._next_at, now) > self._ends_at else None


def keep_pauses(pauses: dict[Key, Pause], hosts: Mapping[Key, HostPace]) -> None:
    """Put down how long hosts are to be left alone, for whoever asks them next.

    To them it is one who asks, whatever pieces the work is cut into. Of too many the oldest are forgotten.
    """
    for key, host in hosts.items():
        pauses.pop(key, None)
        if (pause := host.pause()) is not None:
            pauses[key] = pause
    for key in [key for key, pause in pauses.items() if max(pause.next_at, pause.refused_until) <= time.monotonic()]:
        del pauses[key]
    while len(pauses) > _MAX_PAUSES:
        del pauses[next(iter(pauses))]


def retry_after_s(value: str | None) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date; None where it says nothing."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # a year or a zone that no clock has
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def backoff_s(url: str, attempt: int, base_s: float) -> float:
    """Wait after failed attempt 1, 2, …: doubling, spread by half to one and a half with a seed from the address."""
    spread = int.from_bytes(hashlib.sha256(f"{attempt} {url}".encode()).digest()[:4], "big") / 2**32
    return float(base_s * 2 ** (attempt - 1) * (0.5 + spread))
