"""Dead hosts told from a dead network: when hardly a host can be reached, hosts that were reached before are asked.

A list of old addresses is half dead, and that is a fact about its rows. A resolver that died is none: its rows must not
be marked. So failures alone stop nothing. They call for a probe of hosts that were reached before: where one of them
can still be, the failures stand; where none can, and none for as long as ``fetch.breaker_patience_s``, the shard ends
without a record. Rows that failed in an outage that passed are fetched again.

Before any host was reached there is nobody to probe. Then a name that somebody says there is none of is a fact, and all
else is not: a long row of other failures stops the shard, a much longer one where a name server answers at all, and so
does its end where they are ``fetch.breaker_share`` of its last hosts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from curation.ingest.guard import literal_address
from curation.ingest.suffix import registrable_domain
from curation.stage import OutageError

if TYPE_CHECKING:
    from curation.ingest.fetch import FetchConfig

# What a row ends as where nothing answers; each may as well be the host's own fault.
UNREACHED = ("dns", "connection", "bad_certificate", "timeout", "robots_unreachable")
_NUM_PROBES = 3  # hosts: one of them may be down by itself
_MAX_KNOWN = 64
_PATIENCE_WHERE_ANSWERED = 10  # times ``breaker_hosts``, before any host was reached
_WAY_OUT = "; where they are gone for good, fetch.breaker=false records that"

Place = tuple[str, int]  # host and port


@dataclass(kw_only=True)
class Reached:
    """What a worker knows of the network, from shard to shard."""

    known: dict[Place, None] = field(default_factory=dict)  # hosts that answered, the last one last
    failed: dict[str, None] = field(default_factory=dict)  # domains that did not, since any host answered
    num_named: int = 0  # names that somebody had an answer for, since then
    nameless: set[str] = field(default_factory=set)  # hosts that there are none of; before any host answered

    def named(self, host: str, is_there: bool) -> None:
        """A look-up was answered, if only by `no such name`."""
        self.num_named += 1
        if not is_there and not self.known:
            self.nameless.add(host.removesuffix("."))

    def answered(self, host: str, port: int) -> None:
        """A host sent headers."""
        self.failed.clear()
        self.num_named = 0
        self.nameless.clear()
        self.known.pop((host, port), None)
        self.known[host, port] = None
        if len(self.known) > _MAX_KNOWN:
            del self.known[next(iter(self.known))]


class Breaker:
    """Watches the rows of one shard.

    Args:
        config: ``breaker``, ``breaker_hosts``, ``breaker_share``, ``breaker_patience_s``.
        reached: outlives the shard.
        is_there: whether a host can be reached now.

    ``calm`` is set but while hosts are probed: nobody else is asked in the meantime.
    """

    def __init__(self, config: FetchConfig, reached: Reached, is_there: Callable[[str, int], Awaitable[bool]]) -> None:
        self.config = config
        self.reached = reached
        self.doubted: set[int] = set()  # rows that failed in an outage that passed
        self._is_there = is_there
        self._window: dict[str, str | None] = {}  # the last hosts, with the failure of the last row of each
        self._failed: list[int] = []  # rows, since the network was seen to work
        self._doubts_end_at = 0.0  # loop time: until then failures may still be of the last outage
        self.calm = asyncio.Event()
        self.calm.set()

    async def count(self, image_id: int, host: str | None, reason: str | None) -> None:
        """Count what came of a row; ``reason`` None where bytes came.

        Raises:
            OutageError: nothing can be reached.
        """
        if host is None or not self.config.breaker:
            return
        failure = reason if reason in UNREACHED else None
        if not self.reached.known:
            if failure is None:
                return  # nobody was asked
            if host.removesuffix(".") in self.reached.nameless:
                failure = None
        is_new = host not in self._window
        self._window.pop(host, None)
        self._window[host] = failure
        if len(self._window) > self.config.breaker_hosts:
            del self._window[next(iter(self._window))]
        if failure is None:
            return
        self.reached.failed[_domain(host)] = None
        if asyncio.get_running_loop().time() < self._doubts_end_at:
            self.doubted.add(image_id)
            return
        self._failed.append(image_id)
        is_full = len(self._window) == self.config.breaker_hosts
        if is_new and is_full and self._is_much() and self.calm.is_set():
            if self.reached.known:
                await self._judge()
            elif len(self.reached.failed) >= self._num_believed():
                raise self._nobody_reached()

    async def end(self) -> None:
        """All rows are through: the last ones must not have failed for want of a network.

        Raises:
            OutageError: nothing can be reached.
        """
        if not any(self._window.values()):
            return
        if self.reached.known:
            await self._judge()
        elif self._is_much():
            raise self._nobody_reached()

    def _is_much(self) -> bool:
        failing = sum(value is not None for value in self._window.values())
        return failing >= self.config.breaker_share * len(self._window)

    def _num_believed(self) -> int:
        """Domains that may fail before any host was reached."""
        return self.config.breaker_hosts * (_PATIENCE_WHERE_ANSWERED if self.reached.num_named else 1)

    def _nobody_reached(self) -> OutageError:
        return OutageError(self._text("and no host was reached in between") + _WAY_OUT)

    async def _judge(self) -> None:
        """Whether hosts reached before are there now; it waits for them."""
        self.calm.clear()
        try:
            waited_s, is_out = 0.0, False
            while not await self._probe():
                is_out = True
                if waited_s >= self.config.breaker_patience_s:
                    probed = ", ".join(host for host, _ in self._probed())
                    raise OutageError(
                        self._text(f"and hosts reached before cannot be reached now ({probed})") + _WAY_OUT
                    )
                pause_s = min(max(1.0, waited_s), self.config.breaker_patience_s - waited_s)
                await asyncio.sleep(pause_s)
                waited_s += pause_s
            if is_out:
                # What was asked before ends within a time limit.
                self._doubts_end_at = asyncio.get_running_loop().time() + self.config.timeout_s
                self.doubted.update(self._failed)
            self._failed.clear()
            self._window.clear()
        finally:
            self.calm.set()

    def _probed(self) -> list[Place]:
        return list(self.reached.known)[-_NUM_PROBES:]

    async def _probe(self) -> bool:
        return any(await asyncio.gather(*(self._is_there(host, port) for host, port in self._probed())))

    def _text(self, what: str) -> str:
        failures = [reason for reason in self._window.values() if reason is not None]
        classes = ", ".join(f"{failures.count(name)} {name}" for name in UNREACHED if name in failures)
        return (
            f"{len(failures):,} of the last {len(self._window):,} hosts failed ({classes}) {what}; check the name "
            "server and the network: nothing of this shard was recorded"
        )


def _domain(host: str) -> str:
    """A host without what stands below its domain: names of one dead domain are one failure."""
    return host if literal_address(host) is not None else registrable_domain(host)
