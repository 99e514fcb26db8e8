"""Pages of HTML, fetched as pictures are: same robots.txt, opt-out, pace, guard and patience; another kind of body."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curation.ingest import robots
from curation.ingest.encoding import unpacked
from curation.ingest.fetcher import Fetcher
from curation.ingest.outcome import PIECE_BYTES, Answer, Trail, coding_of
from curation.ingest.pages import MAX_PAGE_BYTES, is_html
from curation.ingest.suffix import registrable_domain

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from yarl import URL

# What a page ends as beside what a picture may (``outcome.TRANSIENT`` and ``PERMANENT``, without ``not_an_image``).
NOT_A_PAGE = "not_a_page"
OFF_DOMAIN = "off_domain"
OF_PAGES = (NOT_A_PAGE, OFF_DOMAIN)


class PageFetcher(Fetcher):
    """Fetches pages. Of one that is too long the first ``MAX_PAGE_BYTES`` come, and one byte that tells it."""

    accept = "text/html,application/xhtml+xml;q=0.9,*/*;q=0.1"

    async def _may_fetch(self, place: URL, trail: Trail) -> tuple[str | None, str | None]:
        """As for pictures; and the page must not lead elsewhere."""
        from yarl import URL

        start = URL(trail.hops[0].url) if trail.hops else place
        if registrable_domain(place.raw_host or "") != registrable_domain(start.raw_host or ""):
            return None, OFF_DOMAIN
        return await super()._may_fetch(place, trail)

    async def _read_body(self, response: ClientResponse, answer: Answer) -> None:
        """Headers first, then as much of the body as a page may have."""
        config = self.config
        if config.respect_opt_out:
            answer.opt_out = robots.opt_out(response.headers.items(), config.agent)
            if answer.opt_out is not None:
                answer.reason = "opt_out"
                return
            answer.nofollow = robots.nofollow(response.headers.items(), config.agent)
        if answer.content_type and not is_html(answer.content_type):
            answer.reason = NOT_A_PAGE
            return
        body = bytearray()
        async for piece in response.content.iter_chunked(PIECE_BYTES):
            body += piece
            if len(body) > MAX_PAGE_BYTES:
                break
        data = bytes(body[: MAX_PAGE_BYTES + 1])
        try:
            for coding in reversed(coding_of(response).split(",")):  # although it was asked for plain
                data = unpacked(data, coding, MAX_PAGE_BYTES + 1)
        except ValueError:
            answer.reason = NOT_A_PAGE
            return
        answer.body = data
