"""A page of HTML: which pictures it shows, where it leads, and what it says to robots.

The parser is libxml2's, fed in pieces and without a tree, so that a page of any shape needs little memory. A page that
nests deeper than any browser goes is left there, since what libxml2 does for a tag grows with the depth it stands in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from urllib.parse import urljoin

from curation.ingest.address import address_error
from curation.ingest.encoding import texts
from curation.ingest.robots import OPT_OUT_DIRECTIVES, TDM_RESERVATION, opt_out
from curation.ingest.rows import MAX_LETTERS, SourceRow, address_row, broken_row, too_long_address

MAX_PAGE_BYTES = (
    8 << 20
)  # also as UTF-8; beyond 10 million libxml2 gives up a comment and looks into it, again and again
MAX_DEPTH = 512  # as browsers have it
MAX_ADDRESSES = 10_000  # pictures of one page, and links of it
MAX_ADDRESS_LETTERS = 8 << 20  # of all of a page: a long base makes each address long, though the page is short
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_HTML_START = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)
_PIECE_BYTES = 1 << 16  # what is unfinished is looked at again with each
_SPACE = " \t\n\r\f"
_LINE_ENDS = str.maketrans("", "", "\t\n\r")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_HTTP = re.compile(r"https?:", re.IGNORECASE)
_PATH_END = re.compile(r"[?#]")
_CANDIDATE = re.compile(r"[\s,]*([^\s,]\S*)")
_IMAGE_METAS = frozenset(("og:image", "og:image:url", "og:image:secure_url", "twitter:image", "twitter:image:src"))


class Link(NamedTuple):
    """Where a page leads."""

    url: str  # absolute, http or https
    nofollow: bool  # the link says that robots should not follow it


class Page(NamedTuple):
    """What a page holds."""

    images: tuple[SourceRow, ...]  # each address once; the last one says why, if the page was not read to its end
    links: tuple[Link, ...]  # each address once, the first MAX_ADDRESSES of them
    robots_directives: frozenset[str]  # what it says to robots, lower case: noindex, nofollow, noimageai, …

    def with_headers(self, headers: Iterable[tuple[str, str]]) -> Page:
        """The page with what its headers say to everybody, in an archive that somebody else asked for."""
        said = opt_out(headers, agent="")
        return self if said is None else self._replace(robots_directives=self.robots_directives | {said})


def is_html(content_type: str) -> bool:
    """Whether a Content-Type is that of a page."""
    return content_type.partition(";")[0].strip().lower() in _HTML_TYPES


def page_of_body(data: bytes, page_url: str, content_type: str | None) -> Page | None:
    """What a body holds; None where the server, or its first bytes where the server is silent, say that it is no page.

    Args and result are those of ``read_page``.
    """
    if not (is_html(content_type) if content_type else _HTML_START.match(data[:1024])):
        return None
    return read_page(data, page_url, content_type)


def said_no(directives: Iterable[str]) -> str | None:
    """Why pictures of a page must not be used, from what it says to robots; None where they may."""
    said = sorted({*OPT_OUT_DIRECTIVES, TDM_RESERVATION}.intersection(directives))
    return f"its page says {said[0]}" if said else None


def read_page(html: bytes, page_url: str, content_type: str | None) -> Page:
    """What a page of HTML holds.

    Args:
        html: as the server sent it, without transfer and content encoding.
        page_url: where it is; what it names is relative to that, or to its ``base``.
        content_type: what the server said, for its charset.
    """
    from lxml import etree

    found = Findings()
    error = None
    parser = etree.HTMLParser(target=_Target(found), recover=True, encoding="utf-8")
    try:
        fed = 0
        for piece in texts(html, content_type, _PIECE_BYTES):
            fed += len(piece)
            if fed > MAX_PAGE_BYTES:
                raise _TooMuchError(f"a page of more than {MAX_PAGE_BYTES:,} bytes")
            parser.feed(piece)
        parser.close()
    except _TooMuchError as stopped:
        error = str(stopped)
    except etree.LxmlError:  # an empty page
        pass
    return found.page(page_url, error)


class Findings:
    """What is met on a page, in its order; addresses are made absolute when all is met, since a base may come late."""

    def __init__(self) -> None:
        self.base: str | None = None
        self._images: dict[str, str | None] = {}  # alt texts by address as it is written
        self._links: dict[str, bool] = {}  # whether nofollow stands at each of them
        self._directives: set[str] = set()

    def image(self, address: str | None, alt_text: str | None = None) -> None:
        """A picture; pictures that stand in the page as ``data:`` are none."""
        if address and not is_inline(address) and (address in self._images or len(self._images) <= MAX_ADDRESSES):
            self._images[address] = self._images.get(address) or alt_text

    def candidates(self, srcset: str | None, alt_text: str | None = None) -> None:
        """The largest picture of a ``srcset``."""
        self.image(largest_candidate(srcset or ""), alt_text)

    def link(self, address: str | None, rel: str | None) -> None:
        """A link."""
        if address and (address in self._links or len(self._links) < MAX_ADDRESSES):
            nofollow = "nofollow" in (rel or "").lower().split()
            self._links[address] = self._links.get(address, True) and nofollow

    def meta(self, name: str | None, content: str | None) -> None:
        """A ``meta`` of the page's head: its pictures for other sites, and what it says to robots."""
        name = (name or "").strip().lower()
        if name in _IMAGE_METAS:
            self.image(content)
        elif name == "robots":
            self._directives |= {word.strip().lower() for word in (content or "").split(",")} - {""}
        elif name == TDM_RESERVATION and (content or "").strip() == "1":
            self._directives.add(TDM_RESERVATION)

    def page(self, page_url: str, error: str | None) -> Page:
        """All of it.

        Args:
            page_url: where the page is.
            error: why it was not read to its end.
        """
        base = page_url if self.base is None else _base(page_url, self.base)
        images: dict[str, str | None] = {}
        num_letters = 0
        for address, alt_text in self._images.items():
            url = _absolute(base, address)
            num_letters += len(url)
            if num_letters > MAX_ADDRESS_LETTERS:
                break
            images[url] = images.get(url) or alt_text
        links: dict[str, bool] = {}
        for address, nofollow in self._links.items():
            if num_letters > MAX_ADDRESS_LETTERS:
                break
            url = _absolute(base, address).partition("#")[0]
            num_letters += len(url)
            if url.startswith(("http://", "https://")) and len(url) <= MAX_LETTERS:
                links[url] = links.get(url, True) and nofollow
        if len(images) > MAX_ADDRESSES:
            error = error or f"a page with more than {MAX_ADDRESSES:,} pictures"
        if num_letters > MAX_ADDRESS_LETTERS:
            error = error or f"a page with addresses of more than {MAX_ADDRESS_LETTERS:,} letters in all"
        rows = [_image_row(url, page_url, images[url]) for url in list(images)[:MAX_ADDRESSES]]
        if error is not None:
            rows.append(broken_row(error, page_url))
        return Page(tuple(rows), tuple(Link(*link) for link in links.items()), frozenset(self._directives))


def is_inline(address: str | None) -> bool:
    """Whether there is nothing to fetch: no address, a place in the page, or the picture itself."""
    start = (address or "")[:64].strip(_SPACE).lower()
    return not start or start.startswith(("data:", "#"))


def largest_candidate(srcset: str) -> str | None:
    """The picture of a ``srcset`` with most pixels: by width where it is told, else by density."""
    best: str | None = None
    largest = (-1.0, -1.0)
    place = 0
    while (found := _CANDIDATE.match(srcset, place)) is not None:
        url, place = found[1], found.end()
        descriptors = ""
        if not url.endswith(","):  # a comma ends a candidate without descriptors
            end = srcset.find(",", place)
            end = len(srcset) if end < 0 else end
            descriptors, place = srcset[place:end], end + 1
        size = (_descriptor(descriptors, "w", 0.0), _descriptor(descriptors, "x", 1.0))
        if size > largest and not is_inline(url):
            best, largest = url.rstrip(","), size
    return best


def _descriptor(descriptors: str, unit: str, default: float) -> float:
    for word in descriptors.split():
        try:
            value = float(word[:-1]) if word.endswith(unit) else -1.0
        except ValueError:
            continue
        if 0.0 <= value < 1e9:
            return value
    return default


def _base(page_url: str, address: str) -> str:
    """What addresses of a page are relative to: as in browsers no base of another scheme, nor one that is none."""
    base = _absolute(page_url, address)
    return base if _HTTP.match(base) and address_error(base) is None else page_url


def _absolute(base: str, address: str) -> str:
    address = address.strip(_SPACE).translate(_LINE_ENDS)
    if _HTTP.match(address) or not _SCHEME.match(address):  # a backslash is a slash there (WHATWG URL, 4.4)
        end = _PATH_END.search(address)
        path = address if end is None else address[: end.start()]
        address = path.replace("\\", "/") + address[len(path) :]
    try:
        return urljoin(base, address)
    except ValueError:  # no address; screening says so
        return address


def _image_row(url: str, page_url: str, alt_text: str | None) -> SourceRow:
    values = {"url": url[:MAX_LETTERS], "page_url": page_url, "alt_text": (alt_text or "").strip()[:MAX_LETTERS]}
    row = address_row(values, {name: name for name in values})
    return row if len(url) <= MAX_LETTERS else row._replace(error=too_long_address())


# Parsing


class _TooMuchError(Exception):
    """The page is left here; the message says why."""


class _Target:
    """What lxml tells of a page, tag by tag."""

    def __init__(self, found: Findings) -> None:
        self._found = found
        self._depth = 0
        self._sources: list[str] = []  # of the ``picture`` that is open: they are shown under the alt text of its img
        self._in_picture = False

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TooMuchError(f"a page nested deeper than {MAX_DEPTH}")
        get = attributes.get
        match tag:
            case "img":
                self._img(attributes)
            case "source" if get("srcset"):
                self._sources.append(str(get("srcset")))
                if not self._in_picture:
                    self._end_of_picture(None)
            case "picture":
                self._in_picture = True
            case "a" | "area":
                self._found.link(get("href"), get("rel"))
            case "meta":
                self._found.meta(get("property") or get("name"), get("content"))
            case "base" if self._found.base is None:
                self._found.base = get("href")

    def end(self, tag: str) -> None:
        self._depth -= 1
        if tag == "picture":
            self._end_of_picture(None)
            self._in_picture = False

    def close(self) -> None:
        self._end_of_picture(None)

    def _img(self, attributes: Mapping[str, str]) -> None:
        alt_text = attributes.get("alt")
        self._end_of_picture(alt_text)
        for name, found in (("src", self._found.image), ("srcset", self._found.candidates)):
            value = attributes.get(name)
            # A page that loads its pictures late keeps their addresses elsewhere.
            found(attributes.get(f"data-{name}") if is_inline(value) else value, alt_text)

    def _end_of_picture(self, alt_text: str | None) -> None:
        for srcset in self._sources:
            self._found.candidates(srcset, alt_text)
        self._sources.clear()
