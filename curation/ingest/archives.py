"""Web archives: WARC, ARC and WAT, record by record, as Common Crawl and others store what they fetched.

Records are parsed by warcio. What is around them is ours, because archives are cut off and damaged: a record that
cannot be read is a row that says why, and reading goes on at the next one that can be found.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from curation.ingest.encoding import unpacked
from curation.ingest.gzips import GZIP, Members
from curation.ingest.lists import Lines
from curation.ingest.pages import MAX_PAGE_BYTES, Page, is_html, page_of_body, said_no
from curation.ingest.rows import broken_row
from curation.ingest.wat import WatError, read_metadata
from training.data.files import open_file, raise_failure

if TYPE_CHECKING:
    from warcio.recordloader import ArcWarcRecord

ARCHIVE_SUFFIXES = tuple(suffix + packed for suffix in (".warc", ".arc", ".wat") for packed in ("", ".gz"))
_BLOCK_BYTES = 4 << 20  # read at once from a bucket
_PIECE_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 16  # of headers
_MAX_HEADERS = 1000
_MAX_DIGITS = 18  # of a length
_HTTP = re.compile(r"https?:", re.IGNORECASE)
_RECORD = re.compile(rb"WARC/[01]\.\d+\s*$|[a-z]+:\S.* [0-9a-f.:]+ \d{8,} \S+ \S+\s*$")  # its first line


def read_archive(path: str) -> Lines:
    """Pictures of the pages of an archive, by number of the record that holds the page.

    Pages are responses with a status of 200 to 299 that are HTML, resources that are, and metadata of pages (WAT). Of
    one that says to robots that it must not be used each picture is a row with that reason.
    """
    with open_file(path, _BLOCK_BYTES) as file:
        for place, page in read_pages(file):
            said = said_no(page.robots_directives)
            for row in page.images:
                yield place, row if said is None or row.error is not None else row._replace(error=said)
        raise_failure(file)


def read_pages(file: BinaryIO) -> Iterator[tuple[int, Page]]:
    """Pages of an archive with the number of their record; a page without pictures is one too.

    What is damaged is a page whose only row says why.
    """
    for place, record in read_records(file):
        if isinstance(record, str):
            yield place, _damaged(record)
        else:
            yield from ((place, page) for page in _pages_of(record))


def read_records(file: BinaryIO) -> Iterator[tuple[int, ArcWarcRecord | str]]:
    """Records by number, from 1; in place of one that cannot be read, why. Each is read to its end before the next."""
    from warcio.exceptions import ArchiveLoadFailed
    from warcio.recordloader import ArcWarcRecordLoader

    logging.getLogger("warcio").setLevel(logging.ERROR)  # it tells of every space in an address that it mends
    stream = Members(file, _begins_record) if file.read(len(GZIP)) == GZIP else None
    file.seek(0)
    reader = _Lines(file if stream is None else io.BufferedReader(stream, _PIECE_BYTES), stream)
    loader = ArcWarcRecordLoader(verify_http=False, arc2warc=False)
    place = 0
    while True:
        in_order = True  # the reader stands behind a record, or at the start
        while line := reader.readline():
            if not line.strip():
                continue
            if _RECORD.match(line):
                place += 1
                reader.begin_record()
                try:
                    record = loader.parse_record_stream(reader, line, None, no_record_parse=True)
                except (ArchiveLoadFailed, EOFError, ValueError):
                    yield place, "its header cannot be read"
                    in_order = False
                    reader.end_record()
                    continue
                reader.lines_left = None
                yield place, record
                _skip(record)
                reader.end_record()
                in_order = _length_of(record) is not None
            elif in_order:
                place += 1
                yield place, "neither a record nor the end where one should be"
                in_order = False
        if stream is None or stream.damage is None:
            return
        place += 1
        yield place, stream.damage
        if not stream.resume():
            return


def _begins_record(data: bytes) -> bool:
    return _RECORD.match(data.partition(b"\n")[0]) is not None


def _skip(record: ArcWarcRecord) -> None:
    while _length_of(record) is not None and record.raw_stream.read(_PIECE_BYTES):
        pass


def _length_of(record: ArcWarcRecord) -> int | None:
    """Bytes that a record should have; None where its header does not say."""
    length = record.rec_headers.get_header("length" if record.format == "arc" else "Content-Length") or ""
    return int(length) if length.isascii() and length.isdigit() and len(length) <= _MAX_DIGITS else None


def _damaged(why: str, page_url: str | None = None) -> Page:
    return Page((broken_row(f"damaged record: {why}", page_url),), (), frozenset())


def _pages_of(record: ArcWarcRecord) -> Iterator[Page]:
    """The page of a record, if it is one, and what is wrong with the record; it is read to its end."""
    url = record.rec_headers.get_header("uri" if record.format == "arc" else "WARC-Target-URI")
    if _length_of(record) is None:
        yield _damaged("its length is no number", url)
        return
    content_type = (record.rec_headers.get_header("Content-Type") or "").lower()
    is_page = record.rec_type in ("response", "resource") and _HTTP.match(url or "") is not None
    if is_page or (record.rec_type == "metadata" and content_type.startswith("application/json")):
        block = _read(record.raw_stream, 2 * MAX_PAGE_BYTES)
        if record.rec_type == "metadata":
            page = _of_metadata(block, url)
        elif record.rec_type == "resource":
            page = page_of_body(block, url, content_type)
        else:
            page = _of_response(block, url)
        if page is not None:
            yield page
    _skip(record)
    if record.raw_stream.limit > 0:
        yield _damaged("it is cut off", url)


def _read(stream: Any, max_bytes: int) -> bytes:
    pieces = []
    while max_bytes > 0 and (piece := stream.read(min(max_bytes, _PIECE_BYTES))):
        pieces.append(piece)
        max_bytes -= len(piece)
    return b"".join(pieces)


def _of_metadata(block: bytes, url: str | None) -> Page | None:
    if len(block) > MAX_PAGE_BYTES:
        return _damaged(f"metadata of more than {MAX_PAGE_BYTES:,} bytes", url)
    try:
        return read_metadata(block)
    except WatError as error:
        return _damaged(str(error), url)


def _of_response(block: bytes, url: str) -> Page | None:
    """The page of an HTTP response; None where it is no page, or a refusal."""
    from warcio.bufferedreaders import ChunkedDataReader
    from warcio.statusandheaders import StatusAndHeadersParser, StatusAndHeadersParserException

    stream = io.BytesIO(block)
    try:
        head = StatusAndHeadersParser(["HTTP/"], verify=True).parse(stream)
        status = int(head.statusline.split()[1])  # behind the version
    except EOFError:
        return None  # nothing came
    except (StatusAndHeadersParserException, ValueError, IndexError):
        return _damaged("no HTTP response", url)
    content_type = head.get_header("content-type")
    if not 200 <= status < 300 or (content_type and not is_html(content_type)):
        return None
    body: Any = stream
    if (head.get_header("transfer-encoding") or "").strip().lower() == "chunked":
        body = ChunkedDataReader(stream)  # what is marked so and is not is given as it is
    data = _read(body, 2 * MAX_PAGE_BYTES)
    for coding in reversed((head.get_header("content-encoding") or "").lower().split(",")):
        try:
            data = unpacked(data, coding, MAX_PAGE_BYTES + 1)
        except ValueError as error:
            return _damaged(str(error), url)
    page = page_of_body(data, url, content_type)
    return None if page is None else page.with_headers(head.headers)


class _Lines:
    """A stream whose lines, headers and records have an end, whatever they say.

    A line without one is cut into pieces; a record of a gzip member ends where the next member begins another record.
    """

    def __init__(self, stream: BinaryIO, members: Members | None) -> None:
        self._stream = stream
        self._members = members
        self.read = stream.read
        self.lines_left: int | None = None  # while headers are read

    def begin_record(self) -> None:
        """What follows is of one record, its headers first."""
        self.lines_left = _MAX_HEADERS
        if self._members is not None:
            self._members.is_in_record = True

    def end_record(self) -> None:
        """What follows is of no record."""
        self.lines_left = None
        if self._members is not None:
            self._members.is_in_record = False

    def readline(self, num_bytes: int | None = None) -> bytes:
        if self.lines_left is not None:
            self.lines_left -= 1
            if self.lines_left < 0:
                raise ValueError("headers without an end")
        return self._stream.readline(min(num_bytes or _MAX_LINE_BYTES, _MAX_LINE_BYTES))
