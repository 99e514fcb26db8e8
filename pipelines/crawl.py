"""Sources of kind pages are crawled before they are registered: what was found is parts of the pool, written once.

A part is some visits of one source, in their order. Its footer says which pages the source named and how far the crawl
was to go, so that the next command knows what was done, what is left, and whether the source changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation.export.objects import parts_of
from curation.ingest.crawl import Crawler, lines_of, to_table, visits_of
from curation.ingest.fetcher import Refuses
from curation.ingest.frontier import SAME_PAGE, Frontier, Limits, Visit
from curation.ingest.register import SECTION_OF_ROLE
from curation.ingest.rows import SourceLine
from curation.ingest.screen import Rules, ScreenConfig
from curation.ingest.sources import SourceConfig, read_seeds
from curation.lease import LeaseLostError
from curation.schema import Part, Role
from curation.stage import OutageError, digest_of
from curation.store import Store, read_footer, read_part, write_part
from pipelines.plan import SOURCES
from pipelines.runner import StageFailedError
from training.config import ConfigError

_TABLE = "pages"
_VERSION = 1
_OF_VISIT = ["page", "url", "depth", "seed", "parent", "reason", "final_url"]
_SAY_EVERY_S = 10.0

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Crawl:
    """A crawl that has something to do, or may have."""

    name: str
    role: Role
    config: SourceConfig
    parts: Sequence[Part]  # that it has written
    asked: Mapping[str, Any]  # what the source names and how far to go, as footers say it
    is_through: bool  # as far as that; some pages are to be visited again

    @property
    def limits(self) -> Limits:
        """How far it goes."""
        return Limits(**{key: getattr(self.config, key) for key in Limits.__dataclass_fields__})


def crawls_to_do(named: Sequence[tuple[str, Role, SourceConfig]], pool: Store, retried: frozenset[str]) -> list[Crawl]:
    """Crawls that are not known to be through: never begun, killed, extended; or with pages to be visited again.

    Raises:
        ConfigError: a source changed instead of being extended.
    """
    known = _known_parts(pool)
    registered = read_part(pool, SOURCES, ["name", "kind"]).to_pylist() if pool.exists(SOURCES.path) else []
    others = {row["name"]: row["kind"] for row in registered if row["kind"] != "pages"}
    found = []
    for name, role, config in named:
        if config.kind != "pages":
            continue
        if name in others:
            raise ConfigError(
                f"{SECTION_OF_ROLE[role]}.{name}: the pool knows {name!r} as a source of kind {others[name]}; "
                "use a new name or a new pool"
            )
        parts = known.get(name, [])
        try:
            before = _said(pool, parts[-1]) if parts else {}
            asked = _asked(name, config, before)
        except ConfigError as error:
            raise ConfigError(f"{SECTION_OF_ROLE[role]}.{name}: {error}") from None
        is_through = before == {**asked, "finished": True}
        if not is_through or not retried.isdisjoint(_reasons(pool, parts)):
            found.append(Crawl(name=name, role=role, config=config, parts=parts, asked=asked, is_through=is_through))
    return found


def refusing(screen: ScreenConfig) -> Refuses:
    """Why screening would drop an address: nobody asks for a page that is on a block list."""
    rules = Rules(screen)
    no = np.zeros(1, bool)

    def refuses(url: str) -> str | None:
        reason: str | None = rules.judge(pa.array([url]), no, no).reason[0].as_py()
        return reason

    return refuses


def crawl_pages(
    crawl: Crawl,
    pool: Store,
    crawler: Crawler,
    *,
    refuses: Refuses,
    retried: frozenset[str],
    scratch: Path,
    check: Callable[[], None],
    say: Say,
) -> None:
    """Do one crawl; each part is committed as it is there, when ``check`` says that the pool is still held.

    Raises:
        StageFailedError: nothing can be reached.
    """
    frontier = Frontier(
        read_seeds(crawl.config),
        crawl.limits,
        _visits(pool, crawl.parts, "links"),
        retried,
    )
    told = _Told(crawl.name, frontier, say)
    through = crawl.is_through

    def commit(visits: list[Visit]) -> None:
        nonlocal through
        check()
        through = frontier.num_waiting == 0
        _commit(pool, to_table(crawl.name, visits), {**crawl.asked, "finished": through}, scratch)
        told.visited(visits)

    try:
        asyncio.run(crawler.crawl(frontier, commit, refuses))
    except OutageError as error:
        raise StageFailedError(f"crawl of {SECTION_OF_ROLE[crawl.role]}.{crawl.name}: {error}") from None
    if not through:  # a longer list or a greater depth that led to nothing new
        commit([])
    told.end(crawl)


def crawled_lines(pool: Store, name: str) -> Iterator[SourceLine]:
    """The rows of a source of kind pages, as far as it was crawled."""
    return lines_of(_visits(pool, _known_parts(pool).get(name, []), "images"))


# What lies in the pool


def _known_parts(pool: Store) -> dict[str, list[Part]]:
    """Parts of each source, in order."""
    found: dict[str, list[Part]] = {}
    for part in parts_of(pool, _TABLE):
        footer = read_footer(pool, part)
        assert footer is not None
        found.setdefault(footer.inputs["source"], []).append(part)
    return found


def _said(pool: Store, part: Part) -> dict[str, Any]:
    footer = read_footer(pool, part)
    assert footer is not None
    return footer.inputs


def _reasons(pool: Store, parts: Sequence[Part]) -> set[str | None]:
    return {reason for part in parts for reason in read_part(pool, part, ["reason"])["reason"].unique().to_pylist()}


def _visits(pool: Store, parts: Sequence[Part], column: str) -> Iterator[Visit]:
    """All visits of a source with one column of what they found; a part is in memory at a time."""
    for part in parts:
        yield from visits_of(read_part(pool, part, [*_OF_VISIT, column]))


def _asked(name: str, config: SourceConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    """What a source names and how far to go; its first pages must be those that it named before."""
    known = int(before.get("num_seeds", 0))
    digest, num_seeds = hashlib.sha256(), 0
    then = digest.hexdigest()
    for seed in read_seeds(config):
        digest.update(json.dumps(seed).encode() + b"\n")
        num_seeds += 1
        if num_seeds == known:
            then = digest.hexdigest()
    if before and (num_seeds < known or then != before["seeds"]):
        how = f"it names {num_seeds:,} pages and named {known:,}"
        if num_seeds >= known:
            how = f"its first {known:,} pages are not those that were crawled"
        raise ConfigError(f"source {name!r} changed instead of being extended: {how}; use a new name or a new pool")
    limits = {key: getattr(config, key) for key in Limits.__dataclass_fields__}
    return {"source": name, "num_seeds": num_seeds, "seeds": digest.hexdigest(), **limits}


def _commit(pool: Store, table: pa.Table, inputs: dict[str, Any], scratch: Path) -> None:
    path = scratch / "pages.parquet"
    origin = digest_of(["crawl", _VERSION])
    write_part(table, path, stage="crawl", version=_VERSION, fingerprint=origin, inputs=inputs)
    part = Part("pool", _TABLE, len(parts_of(pool, _TABLE)))
    if not pool.create(part.path, path):
        raise LeaseLostError(f"{pool.location}/{part.path} is there already; another driver works on the pool")


# What is said


class _Told:
    """How far a crawl is, now and then, and what it came to."""

    def __init__(self, name: str, frontier: Frontier, say: Say) -> None:
        self._name, self._frontier, self._say = name, frontier, say
        self._started = self._said_at = time.monotonic()
        self._num_visits = self._num_images = 0
        self._reasons: Counter[str] = Counter()

    def visited(self, visits: Sequence[Visit]) -> None:
        """Visits were committed."""
        self._num_visits += len(visits)
        self._num_images += sum(visit.num_images for visit in visits)
        self._reasons.update(visit.reason for visit in visits if visit.reason not in (None, SAME_PAGE))
        now = time.monotonic()
        if now - self._said_at > _SAY_EVERY_S:
            self._said_at = now
            rate = self._num_visits / (now - self._started)
            self._say(
                f"  crawl {self._name!r}: {self._num_visits:,} pages, {self._num_images:,} pictures so far; "
                f"{self._frontier.num_waiting:,} pages wait, {rate:.1f} pages/s"
            )

    def end(self, crawl: Crawl) -> None:
        """The crawl is through."""
        failed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self._reasons.items()))
        self._say(
            f"crawl {self._name!r}: {self._num_visits:,} pages visited, {self._num_images:,} pictures on them"
            + (f"; not read: {failed}" if failed else "")
        )
        frontier, limits = self._frontier, crawl.limits
        if frontier.num_seeds_left or frontier.is_cut:
            left = f"{frontier.num_seeds_left:,} pages of the list and " if frontier.num_seeds_left else ""
            self._say(f"  {left}further links were left out: max_pages is {limits.max_pages:,}")
        if frontier.cut_hosts:
            num_hosts, most = len(frontier.cut_hosts), limits.max_pages_per_host
            which = min(frontier.cut_hosts)
            self._say(f"  links of {num_hosts:,} hosts ({which}, …) were left out: max_pages_per_host is {most:,}")
