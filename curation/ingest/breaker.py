"""Dead hosts told from a dead network: when hardly a host can be reached, hosts that were reached before are asked.

A list of old addresses is half dead, and that is a fact about its rows. A resolver that died is none: its rows must not
be marked. So failures alone stop nothing. They call for a probe of hosts that were reached before: where one of them
can still be, the failures stand; where none can, and none for as long as ``fetch.breaker_patience_s``, the shard ends
without a record. Rows that failed in an outage that passed are fetched again.

Before any host was reached there is nobody to probe. Then a name that somebody says there is none of is a fact, and all
else is not: a long row of other failures stops the shard, a much longer one where a name server answers at all, and so
does its end where they are ``fetch.breaker_share`` of its last hosts.

Somebody on the way may also answer for everybody: a proxy, a filter, a login page. Where hardly a host gives a picture
any more, addresses that gave one before are fetched once more, and what comes of that is judged in the same way.
"""

from __future__ import annotations

import asyncio
from collections import Counter
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
_FEW = 0.1  # share of hosts that give pictures, from which on it is asked whether any can
_LEAST_HOSTS = 10  # at the end of a shard
_UNASKED = ("bad_url", "taken_down", "host_busy", "crawl_delay")  # nobody was asked for the picture
_WAY_OUT = "; where they are gone for good, fetch.breaker=false records that"

Place = tuple[str, int]  # host and port


@dataclass(kw_only=True)
class Reached:
    """What a worker knows of the network, from shard to shard."""

    known: dict[Place, None] = field(default_factory=dict)  # hosts that answered, the last one last
    failed: dict[str, None] = field(default_factory=dict)  # domains that did not, since any host answered
    num_named: int = 0  # names that somebody had an answer for, since then
    nameless: set[str] = field(default_factory=set)  # hosts that there are none of; before any host answered
    pictures: dict[str, str] = field(default_factory=dict)  # by host an address that gave one, the last one last

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

    def gave_picture(self, host: str, url: str) -> None:
        """A picture came."""
        self.pictures.pop(host, None)
        self.pictures[host] = url
        if len(self.pictures) > _MAX_KNOWN:
            del self.pictures[next(iter(self.pictures))]


class Breaker:
    """Watches the rows of one shard.

    Args:
        config: ``breaker``, ``breaker_hosts``, ``breaker_share``, ``breaker_patience_s``.
        reached: outlives the shard.
        is_there: whether a host can be reached now.
        gives_picture: whether an address gives one now; None: not asked, as where pages are read.

    ``calm`` is set but while hosts are probed: nobody else is asked in the meantime.
    """

    def __init__(
        self,
        config: FetchConfig,
        reached: Reached,
        is_there: Callable[[str, int], Awaitable[bool]],
        gives_picture: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        self.config = config
        self.reached = reached
        self.doubted: set[int] = set()  # rows that failed in an outage that passed
        self._is_there = is_there
        self._gives_picture = gives_picture
        self._window: dict[str, str | None] = {}  # the last hosts, with the failure of the last row of each
        self._failed: list[int] = []  # rows, since the network was seen to work
        self._answers: dict[str, str | None] = {}  # the last hosts; None where a picture came, else the last failure
        self._without: list[int] = []  # rows that gave none, since pictures were seen to come
        self._num_new = 0  # hosts, since then
        self._num_looked_for = config.breaker_hosts  # of them, before it is looked again
        # Loop time: until then failures may still be of the last outage.
        self._doubts_end_at = self._collapse_ends_at = 0.0
        self.calm = asyncio.Event()
        self.calm.set()

    async def count(self, image_id: int, host: str | None, reason: str | None, url: str = "") -> None:
        """Count what came of a row of an address; ``reason`` None where bytes came.

        Raises:
            OutageError: nothing can be reached, or no picture comes from anywhere.
        """
        if host is None or not self.config.breaker:
            return
        if self._gives_picture is not None and reason not in (*_UNASKED, *UNREACHED):
            await self._count_picture(image_id, host, reason, url)
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
                await self._judge_network()
            elif len(self.reached.failed) >= self._num_believed():
                raise self._nobody_reached()

    async def end(self) -> None:
        """All rows are through: the last ones must not have failed for want of a network.

        Raises:
            OutageError: nothing can be reached, or no picture comes from anywhere.
        """
        if len(self._answers) >= _LEAST_HOSTS and self._is_few():
            await self._judge_pictures()
        if not any(self._window.values()):
            return
        if self.reached.known:
            await self._judge_network()
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

    async def _count_picture(self, image_id: int, host: str, reason: str | None, url: str) -> None:
        is_new = host not in self._answers
        earlier = self._answers.pop(host, "")
        self._answers[host] = None if earlier is None else reason
        if len(self._answers) > self.config.breaker_hosts:
            del self._answers[next(iter(self._answers))]
        if reason is None:
            self.reached.gave_picture(host, url)
            return
        if asyncio.get_running_loop().time() < self._collapse_ends_at:
            self.doubted.add(image_id)
            return
        self._without.append(image_id)
        self._num_new += is_new
        is_full = len(self._answers) == self.config.breaker_hosts and self._num_new >= self._num_looked_for
        if is_new and is_full and self._is_few() and self.calm.is_set():
            await self._judge_pictures()

    def _is_few(self) -> bool:
        """Whether hardly a host gives a picture, although there are addresses that did."""
        num_giving = sum(reason is None for reason in self._answers.values())
        return bool(self.reached.pictures) and num_giving <= _FEW * len(self._answers)

    async def _judge_network(self) -> None:
        """Whether hosts reached before are there now; it waits for them."""
        self._doubts_end_at = await self._judge(self._probe, self._failed, self._outage)
        self._failed.clear()
        self._window.clear()

    async def _judge_pictures(self) -> None:
        """Whether addresses that gave a picture before give one now; it waits for that."""
        self._collapse_ends_at = await self._judge(self._probe_pictures, self._without, self._collapse)
        self._num_looked_for *= 2  # a long dead stretch of a list is no reason to ask the same few again and again
        self._num_new = 0
        self._without.clear()
        self._answers.clear()

    async def _judge(
        self, probe: Callable[[], Awaitable[bool]], failed: list[int], error: Callable[[], OutageError]
    ) -> float:
        """Wait for a probe to succeed. Rows that failed are doubted where it did not at once; until when others are."""
        self.calm.clear()
        try:
            waited_s, is_out = 0.0, False
            while not await probe():
                is_out = True
                if waited_s >= self.config.breaker_patience_s:
                    raise error()
                pause_s = min(max(1.0, waited_s), self.config.breaker_patience_s - waited_s)
                await asyncio.sleep(pause_s)
                waited_s += pause_s
            if not is_out:
                return 0.0
            self.doubted.update(failed)
            return asyncio.get_running_loop().time() + self.config.timeout_s  # what was asked before ends until then
        finally:
            self.calm.set()

    def _probed(self) -> list[Place]:
        return list(self.reached.known)[-_NUM_PROBES:]

    async def _probe(self) -> bool:
        return any(await asyncio.gather(*(self._is_there(host, port) for host, port in self._probed())))

    async def _probe_pictures(self) -> bool:
        assert self._gives_picture is not None
        asked = list(self.reached.pictures.items())[:_NUM_PROBES]
        gives = await asyncio.gather(*(self._gives_picture(url) for _, url in asked))
        if any(gives):
            for host, url in asked:
                self.reached.gave_picture(host, url)  # others are asked next time
        return any(gives)

    def _outage(self) -> OutageError:
        probed = ", ".join(host for host, _ in self._probed())
        return OutageError(self._text(f"and hosts reached before cannot be reached now ({probed})") + _WAY_OUT)

    def _collapse(self) -> OutageError:
        asked = ", ".join(list(self.reached.pictures.values())[:_NUM_PROBES])
        failures = Counter(reason for reason in self._answers.values() if reason is not None)
        return OutageError(
            f"{failures.total():,} of the last {len(self._answers):,} hosts gave no picture ({_listed(failures)}) and "
            f"addresses that gave one before give none now ({asked}); somebody on the way may answer for all, such as "
            "a proxy, a filter or a login page: nothing of this shard was recorded" + _WAY_OUT
        )

    def _text(self, what: str) -> str:
        failures = Counter(reason for reason in self._window.values() if reason is not None)
        return (
            f"{failures.total():,} of the last {len(self._window):,} hosts failed ({_listed(failures)}) {what}; check "
            "the name server and the network: nothing of this shard was recorded"
        )


def _listed(failures: Counter[str]) -> str:
    known = [name for name in UNREACHED if name in failures]
    return ", ".join(f"{failures[name]} {name}" for name in (*known, *sorted(failures.keys() - set(known))))


def _domain(host: str) -> str:
    """A host without what stands below its domain: names of one dead domain are one failure."""
    return host if literal_address(host) is not None else registrable_domain(host)
