"""A crawl: pages fetched some at a time, what each of them shows and where it leads, and how its rows are read again.

What a crawl found is written once, visit by visit, since ids follow from the order of what was found and the web
changes. A visit is a fact: it says what the page holds, not whether it will be followed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from curation.ingest.address import AddressError, canonical_url, parse_address
from curation.ingest.breaker import Breaker, Reached
from curation.ingest.fetch import FetchConfig
from curation.ingest.fetcher import Refuses
from curation.ingest.frontier import SAME_PAGE, Candidate, Frontier, Visit
from curation.ingest.guard import Contact
from curation.ingest.outcome import Outcome
from curation.ingest.pagefetcher import NOT_A_PAGE, PageFetcher
from curation.ingest.pages import Page, page_of_body, said_no
from curation.ingest.pictures import PICTURE_SUFFIXES
from curation.ingest.robots import NOFOLLOW_DIRECTIVES, Rules, forget_unreachable
from curation.ingest.rows import SourceLine, SourceRow, broken_row
from curation.ingest.suffix import registrable_domain
from curation.ingest.takedown import Rules as Takedowns
from curation.schema import TABLES
from curation.stage import OutageError

PAGES_IN_PART = 64  # visits that a killed crawl repeats at most, and whose pages are in memory at once
MAX_LINK_LETTERS = 2000  # longer ones are traps more often than pages
_AT_ONCE = 16  # pages that come at once, of up to 8 MB each
# Links to these are not followed: they would be asked for, and be no page.
_NO_PAGES = frozenset(
    (
        *PICTURE_SUFFIXES,
        *(".svg", ".ico", ".mp3", ".mp4", ".avi", ".mov", ".webm", ".wav", ".pdf", ".doc", ".docx", ".xls", ".xlsx"),
        *(".zip", ".gz", ".tar", ".7z", ".rar", ".exe", ".dmg", ".css", ".js", ".json", ".xml", ".rss", ".csv"),
    )
)


class _Found(NamedTuple):
    """What came of asking for a page."""

    outcome: Outcome  # without its body
    page: Page | None = None  # without its links; with what its headers say to robots
    num_links: int = 0
    links: Sequence[str] = ()  # where it leads that may be followed


class Crawler:
    """Visits pages by the rules under which pictures are fetched.

    Args:
        config: of the stage fetch.
        taken_down: addresses that are not asked for.
        contact: is told of every address before a socket to it exists, and may raise.
    """

    def __init__(
        self,
        config: FetchConfig,
        *,
        taken_down: Takedowns | None = None,
        contact: Contact | None = None,
    ) -> None:
        self._config = config.model_copy(update={"concurrency": min(config.concurrency, _AT_ONCE)})
        self._taken_down, self._contact = taken_down, contact
        self._rules: dict[str, Rules] = {}  # robots.txt, for all crawls of a command
        self._reached = Reached()
        # Beside the event loop, where a long page would keep others waiting beyond their time limit; one at a time, of
        # up to 260 MB.
        self._reader = ThreadPoolExecutor(1, "page")

    async def crawl(self, frontier: Frontier, commit: Callable[[list[Visit]], None], refuses: Refuses) -> None:
        """Visit what is left of a crawl.

        Args:
            frontier: what is left.
            commit: takes the visits, some at a time, in their order.
            refuses: why an address must not be asked for; None where it may.

        Raises:
            OutageError: nothing can be reached.
        """
        async with PageFetcher(
            self._config,
            refuses=refuses,
            rules=self._rules,
            contact=self._contact,
            taken_down=self._taken_down,
            reached=self._reached,
        ) as fetcher:
            while candidates := frontier.next(PAGES_IN_PART):
                fetcher.renew_patience()
                found = await self._ask(fetcher, candidates)
                visits = []
                for place, candidate in enumerate(candidates):  # in their order, whichever came first
                    visits.append(self._visit(candidate, found.get(place), frontier))
                    frontier.visited(visits[-1])
                commit(visits)

    async def _ask(self, fetcher: PageFetcher, candidates: Sequence[Candidate]) -> dict[int, _Found]:
        """What came of those that may be asked for, by place; those that failed in an outage that passed go again."""
        found: dict[int, _Found] = {}
        left = {place for place, candidate in enumerate(candidates) if candidate.reason is None}
        try:
            while left:
                left = await self._ask_once(fetcher, {place: candidates[place].url for place in sorted(left)}, found)
                if left:
                    forget_unreachable(self._rules)
                    fetcher.forget_failures()
        except (BaseExceptionGroup, OutageError) as error:
            forget_unreachable(self._rules)
            raise (error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error) from None
        return found

    async def _ask_once(self, fetcher: PageFetcher, urls: dict[int, str], found: dict[int, _Found]) -> set[int]:
        breaker = Breaker(self._config, self._reached, fetcher.is_there)
        fetcher.calm = breaker.calm

        async def one(place: int, url: str) -> None:
            outcome = await fetcher.fetch(url)
            found[place] = await asyncio.get_running_loop().run_in_executor(self._reader, self._read, outcome)
            await breaker.count(place, parse_address(url).host, outcome.reason)

        async with asyncio.TaskGroup() as group:
            for place, url in urls.items():
                group.create_task(one(place, url))
        await breaker.end()
        return breaker.doubted

    def _read(self, outcome: Outcome) -> _Found:
        """What came, read. Of thousands of links only those that may be followed are held until the part is full."""
        body, outcome = outcome.body, replace(outcome, body=None)
        page = None if body is None else page_of_body(body, str(outcome.final_url), outcome.content_type)
        if page is None:
            return _Found(outcome)
        at = canonical_url(str(outcome.final_url))
        directives = page.robots_directives | ({"nofollow"} if outcome.nofollow else set())
        links: list[str] = []
        if not self._config.respect_opt_out or not directives & NOFOLLOW_DIRECTIVES:
            links = followable(page, at, respect_nofollow=self._config.respect_opt_out)
        page, num_links = page._replace(links=(), robots_directives=directives), len(page.links)
        return _Found(outcome, page, num_links, links)

    def _visit(self, candidate: Candidate, found: _Found | None, frontier: Frontier) -> Visit:
        """The row of a visit."""
        visit = Visit(
            page=frontier.num_visits,
            url=candidate.url,
            depth=candidate.depth,
            seed=candidate.seed,
            parent=candidate.parent,
            reason=candidate.reason,
        )
        if found is None:
            return visit
        outcome, page, num_links, links = found
        no_page = outcome.reason == "not_an_image" or (outcome.reason is None and page is None)
        visit = replace(
            visit,
            reason=NOT_A_PAGE if no_page else outcome.reason,
            http_status=outcome.http_status,
            content_type=outcome.content_type,
            robots=outcome.robots,
            opt_out=outcome.opt_out,
        )
        if page is None:
            return visit
        at = canonical_url(str(outcome.final_url))
        if frontier.is_read(at):
            return replace(visit, reason=SAME_PAGE)
        images = [_image(row) for row in page.images]
        if self._config.respect_opt_out and (said := said_no(page.robots_directives)):
            images = [{**image, "error": image["error"] or said} for image in images]
        return replace(
            visit,
            final_url=at,
            directives=sorted(page.robots_directives),
            num_images=len(images),
            num_links=num_links,
            images=images,
            links=links,
        )


def followable(page: Page, at: str, *, respect_nofollow: bool) -> list[str]:
    """Where a crawl may go from a page, canonical, each once, in the order of the page: no further than its domain.

    Args:
        page: what was read.
        at: where it stands.
        respect_nofollow: leave out links that say so themselves.
    """
    domain = registrable_domain(parse_address(at).host)
    found: dict[str, None] = {}
    for link in page.links:
        if link.nofollow and respect_nofollow:
            continue
        try:
            url = canonical_url(link.url)
        except AddressError:
            continue
        address = parse_address(url)
        suffix = PurePosixPath(address.path).suffix.lower()
        if len(url) > MAX_LINK_LETTERS or address.userinfo or suffix in _NO_PAGES or url == at:
            continue
        if registrable_domain(address.host) == domain:
            found[url] = None
    return list(found)


def _image(row: SourceRow) -> dict[str, Any]:
    return {"url": row.url, "alt_text": row.alt_text, "error": row.error}


# The table


def to_table(source: str, visits: Sequence[Visit]) -> pa.Table:
    """A part of the table ``pages``."""
    return pa.Table.from_pylist([{"source": source, **vars(visit)} for visit in visits], schema=TABLES["pages"].schema)


def visits_of(table: pa.Table) -> Iterator[Visit]:
    """Visits of some rows of the table ``pages``; columns that were not read are empty."""
    for row in table.to_pylist():
        row.pop("source", None)
        yield Visit(**row)


def lines_of(visits: Iterable[Visit]) -> Iterator[SourceLine]:
    """The rows that registration takes: pictures in the order of visits and pages, and each page that was not read.

    A page that was visited again and failed again has one row.
    """
    failed: set[tuple[str, int, int]] = set()
    for visit in visits:
        page = (visit.url, visit.depth, visit.seed)
        if visit.reason is not None and visit.reason != SAME_PAGE and page not in failed:
            failed.add(page)
            yield SourceLine(visit.url, None, broken_row(f"page not read: {visit.reason}", visit.url))
        at = visit.final_url or visit.url
        for place, image in enumerate(visit.images, 1):
            row = SourceRow(image["url"], None, at, image["alt_text"], None, image["error"])
            yield SourceLine(at, place, row)
