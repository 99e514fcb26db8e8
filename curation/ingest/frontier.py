"""The order of a crawl: which page comes next, given the pages of the source and what was visited until now.

Breadth first: pages that the source names, then what they link to, in the order of these pages and of the links on
them. Nothing of it depends on which page arrived first, and nothing but the visits has to be kept: who is told them
again goes on where the crawl stopped. More pages, a greater depth or a higher cap only add visits behind those that
were made.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from curation.ingest.address import AddressError, canonical_url, parse_address

BAD_URL = "bad_url"
SAME_PAGE = "same_page"  # it was read under another address, or is named twice


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a crawl goes."""

    depth: int  # links from a page that the source names
    max_pages: int  # named and found
    max_pages_per_host: int  # as far as they are found: pages that are named are meant


class Candidate(NamedTuple):
    """A page to visit."""

    url: str  # canonical
    depth: int
    seed: int  # line of the source that led here, from 0
    parent: int | None  # number of the visit that led here; None for what the source names
    reason: str | None = None  # it is not asked for: why


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One visit to a page: a row of the table ``pages`` but for the name of its source."""

    page: int
    url: str
    depth: int
    seed: int
    parent: int | None
    reason: str | None = None
    http_status: int | None = None
    final_url: str | None = None  # canonical, of a page that was read
    content_type: str | None = None
    robots: str | None = None
    opt_out: str | None = None
    directives: Sequence[str] = ()
    num_images: int = 0
    num_links: int = 0
    images: Sequence[dict[str, Any]] = field(default=(), repr=False)  # url, alt_text, error
    links: Sequence[str] = field(default=(), repr=False)  # canonical, those that may be followed


class Frontier:
    """Pages that are known and not visited. It holds an address for each of at most ``max_pages`` pages.

    Args:
        seeds: addresses as the source has them, in its order.
        limits: how far to go.
        visits: that were made, in order.
        retried: failure classes; pages whose last visit ended so are visited again.
    """

    def __init__(
        self, seeds: Iterable[str], limits: Limits, visits: Iterable[Visit] = (), retried: frozenset[str] = frozenset()
    ) -> None:
        self._limits = limits
        self._levels: dict[int, OrderedDict[str | int, Candidate]] = {}
        self._known: set[str] = set()  # waiting or visited
        self._read: set[str] = set()  # where pages that were read stand
        self._hosts: Counter[str] = Counter()  # of pages that are known
        self._num_known = 0
        self.num_visits = 0
        self.num_seeds_left = 0  # beyond ``max_pages``
        self.is_cut = False  # links were left out for ``max_pages``
        self.cut_hosts: set[str] = set()  # that had more than ``max_pages_per_host``
        for number, seed in enumerate(seeds):
            self._take_seed(number, seed)
        failed: dict[str | int, Candidate] = {}
        for visit in visits:
            self.visited(visit)
            candidate = Candidate(visit.url, visit.depth, visit.seed, visit.parent)
            failed.pop(_key(candidate), None)
            if visit.reason in retried:
                failed[_key(candidate)] = candidate
        for key, candidate in failed.items():
            self._level(candidate.depth)[key] = candidate

    @property
    def num_waiting(self) -> int:
        """Pages that are known and not visited."""
        return sum(map(len, self._levels.values()))

    def next(self, num_pages: int) -> list[Candidate]:
        """The pages to visit next, at most so many and all of one depth, so that none of them may lead to another."""
        taken: list[Candidate] = []
        for depth in sorted(self._levels):
            level = self._levels[depth]
            while level and len(taken) < num_pages:
                _, candidate = level.popitem(last=False)
                if candidate.url not in self._read:
                    taken.append(candidate)
                elif candidate.parent is None:  # named by the source, so it has a row
                    taken.append(candidate._replace(reason=candidate.reason or SAME_PAGE))
            if taken:
                break
        return taken

    def is_read(self, url: str) -> bool:
        """Whether the page that stands at an address was read already."""
        return url in self._read

    def visited(self, visit: Visit) -> None:
        """A visit was made, the next of all: what it found waits from now on."""
        candidate = Candidate(visit.url, visit.depth, visit.seed, visit.parent)
        self.num_visits += 1
        if self._level(visit.depth).pop(_key(candidate), None) is None and visit.url not in self._known:
            self._note(visit.url)  # visited when limits were wider, or taken for this visit
        if visit.final_url is not None:
            self._read.add(visit.final_url)
        if visit.depth < self._limits.depth:
            for link in visit.links:
                self._offer(Candidate(link, visit.depth + 1, visit.seed, visit.page))

    def _take_seed(self, number: int, seed: str) -> None:
        if self._num_known >= self._limits.max_pages:
            self.num_seeds_left += 1
            return
        reason, url = None, seed.strip()
        try:
            url = canonical_url(seed)
            if parse_address(url).scheme not in ("http", "https"):
                reason = BAD_URL
        except AddressError:
            reason = BAD_URL
        if url in self._known:
            reason = reason or SAME_PAGE
            self._num_known += 1
        else:
            self._note(url)
        self._level(0)[number] = Candidate(url, 0, number, None, reason)

    def _offer(self, candidate: Candidate) -> None:
        if candidate.url in self._known:
            return
        host = parse_address(candidate.url).host
        if self._num_known >= self._limits.max_pages:
            self.is_cut = True
        elif self._hosts[host] >= self._limits.max_pages_per_host:
            self.cut_hosts.add(host)
        else:
            self._note(candidate.url)
            self._level(candidate.depth)[_key(candidate)] = candidate

    def _note(self, url: str) -> None:
        self._known.add(url)
        self._num_known += 1
        with suppress(AddressError):  # a line of the source may be none
            self._hosts[parse_address(url).host] += 1

    def _level(self, depth: int) -> OrderedDict[str | int, Candidate]:
        return self._levels.setdefault(depth, OrderedDict())


def _key(candidate: Candidate) -> str | int:
    """Pages that the source names go by their line: it may name one twice."""
    return candidate.seed if candidate.parent is None else candidate.url
