"""Web archives, whole and damaged: each page once, each damage a row, and the same addresses from WARC and WAT."""

import gzip
import io
import json
import re
import tarfile
import zlib
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from curation.ingest import gzips
from curation.ingest.archives import read_pages, read_records
from curation.ingest.gzips import Members
from curation.ingest.rows import SourceRow
from curation.ingest.sources import SourceConfig, check_source, read_lines

PAGES = {
    "http://a.test/1": "<head><base href='/deep/'><meta property='og:image' content=og.jpg></head>"
    "<body><img src=1.jpg alt='one &amp; only'><a href=next rel=nofollow>n</a>",
    "http://b.test/2": "<picture><source srcset='s.webp 1x, l.webp 2x'><img src=p.jpg alt=p></picture>"
    "<img src='data:image/gif;base64,R0' data-src=late.jpg><img srcset='m.jpg 10w, n.jpg 20w'>",
    "http://c.test/3": "<p>no picture",
    "http://d.test/ü": "<img src='//e.test/x.png'><img src='http://[::1/x'>",
}


def add_response(writer, url, body, *, status="200 OK", headers=(("Content-Type", "text/html; charset=utf-8"),)):
    http = StatusAndHeaders(status, list(headers), protocol="HTTP/1.1")
    record = writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=http)
    writer.write_record(record)


def warc_of(pages, *, packed=True, **values):
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=packed)
    writer.write_record(writer.create_warcinfo_record("test.warc.gz", {"software": "test"}))
    for url, html in pages.items():
        add_response(writer, url, html if isinstance(html, bytes) else html.encode(), **values)
    return out.getvalue()


def wat_of(warc):
    """What Common Crawl's extractor writes of an archive: one JSON a record, its links attribute by attribute."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    for record in ArchiveIterator(io.BytesIO(warc)):
        url = record.rec_headers.get_header("WARC-Target-URI")
        envelope = {"WARC-Header-Metadata": {"WARC-Type": record.rec_type, "WARC-Target-URI": url}}
        if record.rec_type == "response":
            html = record.content_stream().read().decode()
            envelope["Payload-Metadata"] = {
                "HTTP-Response-Metadata": {
                    "Response-Message": {"Status": "200"},
                    "Headers": dict(record.http_headers.headers),
                    "HTML-Metadata": html_metadata(html),
                }
            }
        data = json.dumps({"Container": {"Filename": "x"}, "Envelope": envelope}).encode()
        writer.write_record(
            writer.create_warc_record(
                url or "", "metadata", payload=io.BytesIO(data), warc_content_type="application/json"
            )
        )
    return out.getvalue()


class Links(HTMLParser):
    """By Python's own parser: another reader than ours."""

    def __init__(self):
        super().__init__()
        self.links, self.head = [], {}

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        if tag == "base":
            self.head["Base"] = values["href"]
        if tag == "meta":
            self.head.setdefault("Metas", []).append(values)
        for name in ("src", "data-src", "srcset", "href"):
            if name in values and tag in ("img", "source", "a"):
                rest = {"alt": values["alt"]} if name == "src" and "alt" in values else {}
                rest |= {"rel": values["rel"]} if "rel" in values else {}
                self.links.append({"path": f"{tag.upper()}@/{name}", "url": values[name], **rest})


def html_metadata(html):
    parser = Links()
    parser.feed(html)
    return {"Head": parser.head, "Links": parser.links}


def rows_of(path):
    config = SourceConfig(location=str(path), kind="archive")
    check_source("sources.x", config)
    return [(line.file_line, line.row) for line in read_lines(config)]


FOUND = [
    (2, "http://a.test/deep/og.jpg", "http://a.test/1", None),
    (2, "http://a.test/deep/1.jpg", "http://a.test/1", "one & only"),
    (3, "http://b.test/l.webp", "http://b.test/2", "p"),
    (3, "http://b.test/p.jpg", "http://b.test/2", "p"),
    (3, "http://b.test/late.jpg", "http://b.test/2", None),
    (3, "http://b.test/n.jpg", "http://b.test/2", None),
    (5, "http://e.test/x.png", "http://d.test/ü", None),
    (5, "http://[::1/x", "http://d.test/ü", None),
]


@pytest.mark.parametrize("packed", [True, False])
def test_pictures_of_a_warc(tmp_path, packed):
    path = tmp_path / ("x.warc.gz" if packed else "x.warc")
    path.write_bytes(warc_of(PAGES, packed=packed))
    rows = rows_of(path)
    assert [(place, row.url, row.page_url, row.alt_text) for place, row in rows] == FOUND
    assert [row.error for _, row in rows] == [None] * 7 + ["no address: Invalid IPv6 URL"]


def test_the_scheme_of_a_page_may_be_in_capitals(tmp_path):
    (tmp_path / "x.warc.gz").write_bytes(
        warc_of({"HTTP://A.test/x/": "<img src=1.jpg>", "HttpS://a.test/": "<img src=2>"})
    )
    assert [(row.url, row.page_url, row.error) for _, row in rows_of(tmp_path / "x.warc.gz")] == [
        ("http://A.test/x/1.jpg", "HTTP://A.test/x/", None),
        ("https://a.test/2", "HttpS://a.test/", None),
    ]


def test_warc_and_wat_agree(tmp_path):
    warc = warc_of(PAGES)
    (tmp_path / "x.warc.gz").write_bytes(warc)
    (tmp_path / "x.warc.wat.gz").write_bytes(wat_of(warc))
    of_warc, of_wat = rows_of(tmp_path / "x.warc.gz"), rows_of(tmp_path / "x.warc.wat.gz")
    assert [(row.url, row.page_url, row.error) for _, row in of_wat] == [
        (row.url, row.page_url, row.error) for _, row in of_warc
    ]
    # A source of a picture has no alt text in WAT.
    assert [row.alt_text for _, row in of_wat] == [None, "one & only", None, "p", None, None, None, None]
    pages = [list(read_pages(io.BytesIO(data))) for data in (warc, wat_of(warc))]
    assert [page.links for _, page in pages[0]] == [page.links for _, page in pages[1]]


def test_pictures_of_a_page_that_must_not_be_used_are_rows_that_say_so(tmp_path):
    html = b"<img src=a.jpg>"
    said = (
        (b"<meta name=robots content='max-snippet:1, NoImageAI'>" + html, {}, "noimageai"),
        (html, {"X-Robots-Tag": "noai"}, "noai"),
        (html, {"X-Robots-Tag": "otherbot: noai"}, None),
        (html, {"TDM-Reservation": "1"}, "tdm-reservation"),
        (b"<meta name=TDM-Reservation content=' 1'>" + html, {}, "tdm-reservation"),
        (b"<meta name=tdm-reservation content=0>" + html, {}, None),
        (b"<meta name=robots content=nofollow>" + html, {}, None),
    )
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    for place, (body, more, _) in enumerate(said):
        headers = (("Content-Type", "text/html"), *more.items())
        add_response(writer, f"http://h{place}.test/", body, headers=headers)
    (tmp_path / "pages.warc.gz").write_bytes(out.getvalue())
    (tmp_path / "pages.wat").write_bytes(wat_of(out.getvalue()))
    expected = [None if one is None else f"its page says {one}" for _, _, one in said]
    for name in ("pages.warc.gz", "pages.wat"):
        rows = [row for _, row in rows_of(tmp_path / name)]
        assert [row.error for row in rows] == expected
        assert [row.url for row in rows] == [f"http://h{place}.test/a.jpg" for place in range(len(said))]


def test_a_folder_of_archives_and_what_is_none(tmp_path):
    for name in ("b/2.warc.gz", "a/1.warc", "a/3.wat.gz", "a/.hidden.warc", "a/4.wet.gz", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        packed = name.endswith(".gz")
        warc = warc_of({f"http://a.test/{path.name}": "<img src=x>"}, packed=packed)
        path.write_bytes(wat_of(warc) if ".wat" in name else warc)
    lines = list(read_lines(SourceConfig(location=str(tmp_path), kind="archive")))
    assert [line.file for line in lines] == ["a/1.warc", "a/3.wat.gz", "b/2.warc.gz"]
    assert [line.row.page_url for line in lines] == [f"http://a.test/{line.file[2:]}" for line in lines]


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "GZIP", "identity", "gzip, br"])
def test_transfer_and_content_encodings(tmp_path, coding):
    import brotli

    body = b"<img src=1.jpg>"
    packs = {"gzip": gzip.compress, "br": brotli.compress, "deflate": zlib.compress}
    for step in coding.lower().split(", "):
        body = packs.get(step, bytes)(body)
    chunked = b"5\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
    headers = [("Content-Type", "text/HTML"), ("Content-Encoding", coding)]
    for data, more in ((body, []), (chunked, [("Transfer-Encoding", "chunked")])):
        (tmp_path / "x.warc.gz").write_bytes(warc_of({"http://a.test/": data}, headers=[*headers, *more]))
        assert [row.url for _, row in rows_of(tmp_path / "x.warc.gz")] == ["http://a.test/1.jpg"]


@pytest.mark.parametrize(
    ("status", "content_type", "body", "is_page"),
    [
        ("200 OK", "text/html", b"<img src=x>", True),
        ("206 Partial", "application/xhtml+xml; charset=utf-8", b"<img src=x>", True),
        ("200 OK", None, b"\n<!DOCTYPE html><img src=x>", True),
        ("200 OK", None, b"\x89PNG", False),
        ("200 OK", "image/png", b"<img src=x>", False),
        ("404 Not Found", "text/html", b"<img src=x>", False),
        ("302 Found", "text/html", b"<img src=x>", False),
    ],
)
def test_which_responses_are_pages(status, content_type, body, is_page):
    headers = [("Content-Type", content_type)] if content_type else []
    pages = list(read_pages(io.BytesIO(warc_of({"http://a.test/": body}, status=status, headers=headers))))
    assert [len(page.images) for _, page in pages] == [1] * is_page


# Damage


def members_of(warc):
    """Offsets of the gzip members."""
    return [found.start() for found in re.finditer(rb"\x1f\x8b\x08", warc)]


def test_a_file_that_is_cut_off_gives_what_stands_before(tmp_path):
    for packed in (True, False):
        warc = warc_of(PAGES, packed=packed)
        start = members_of(warc)[3] if packed else warc.index(b"WARC/1.0", warc.index(b"http://b.test/2"))
        for cut in (start + 60, start - 30 if packed else start - 130):
            path = tmp_path / ("x.warc.gz" if packed else "x.warc")
            path.write_bytes(warc[:cut])
            rows = [row for _, row in rows_of(path)]
            assert [row.url for row in rows if row.error is None][:2] == [url for _, url, _, _ in FOUND[:2]]
            assert rows[-1].error in (
                "damaged record: it is cut off",
                "damaged record: its length is no number",
                "damaged record: its header cannot be read",
            )


def test_reading_goes_on_behind_a_damaged_member(tmp_path):
    pages = {f"http://a.test/{n}": f"<img src={n}.jpg>" + f"<!-- {n * 7919} -->" * 300 for n in range(5)}
    warc = bytearray(warc_of(pages))
    middle = members_of(warc)[3] + 150
    warc[middle : middle + 40] = bytes(byte ^ 0xFF for byte in warc[middle : middle + 40])
    (tmp_path / "x.warc.gz").write_bytes(warc)
    rows = [row for _, row in rows_of(tmp_path / "x.warc.gz")]
    assert [row.url for row in rows if row.url and "/2.jpg" not in row.url] == [
        f"http://a.test/{n}.jpg" for n in (0, 1, 3, 4)
    ]
    errors = [row.error for row in rows if row.error]
    assert errors
    assert all(error.startswith("damaged record: ") for error in errors)


@pytest.mark.parametrize("junk", [b"\x1f\x8b\x08", b"\x1f\x8b\x08\x00"])
def test_what_looks_like_members_is_passed_over_at_once(junk, monkeypatch):
    tried = []

    class Unpack:
        error = zlib.error

        def decompressobj(self, bits):
            inner = zlib.decompressobj(bits)
            return SimpleNamespace(
                decompress=lambda data, most: tried.append(len(data)) or inner.decompress(data, most)
            )

    first, second = (warc_of({f"http://a.test/{n}": f"<img src={n}.jpg>"}) for n in (1, 2))
    damaged = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 100
    for before in (b"", b"x" * 1000):  # the member behind it stands at the end of a block, and elsewhere
        warc = first + damaged + before + junk * (((1 << 20) - 150) // len(junk)) + second
        members = Members(io.BytesIO(warc), lambda data: data.startswith(b"WARC/"))
        assert members.readall().count(b"WARC/1.0") == 2
        monkeypatch.setattr(gzips, "zlib", Unpack())
        tried.clear()
        assert members.resume()
        monkeypatch.undo()
        assert members.readall().count(b"WARC/1.0") == 2
        assert sum(size > 1024 for size in tried) <= 2
        assert len(tried) <= (len(warc) // 4 if len(junk) > 3 else 8)


def a_record(number, *, length=None):
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<img src=%d.jpg>" % number
    head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.test/%d\r\nContent-Length: %d\r\n\r\n"
    return head % (number, length or len(http)) + http + b"\r\n\r\n"


def test_a_record_that_is_said_to_be_longer_ends_with_its_member(tmp_path):
    cut = a_record(3)[:40]  # in its headers
    records = [a_record(0), a_record(1, length=99_999_999), a_record(2), cut, *(a_record(n) for n in range(4, 54))]
    (tmp_path / "x.warc.gz").write_bytes(b"".join(gzip.compress(record) for record in records))
    rows = rows_of(tmp_path / "x.warc.gz")
    good = [n for n in range(54) if n != 3]
    assert [row.url for _, row in rows if row.error is None] == [f"http://a.test/{n}.jpg" for n in good]
    assert [(place, row.page_url, row.error) for place, row in rows if row.error] == [
        (2, "http://a.test/1", "damaged record: it is cut off"),
        (4, None, "damaged record: its length is no number"),
    ]


def test_a_record_may_be_of_several_members(tmp_path):
    data = b"".join(a_record(n) for n in range(20))
    for size in (7, 100, 1000):
        pieces = (data[at : at + size] for at in range(0, len(data), size))
        (tmp_path / "x.warc.gz").write_bytes(b"".join(gzip.compress(piece) for piece in pieces))
        rows = rows_of(tmp_path / "x.warc.gz")
        assert [(place, row.url, row.error) for place, row in rows] == [
            (n + 1, f"http://a.test/{n}.jpg", None) for n in range(20)
        ]


def test_reading_goes_on_behind_what_is_no_record(tmp_path):
    first, second = (warc_of({f"http://a.test/{n}": f"<img src={n}.jpg>"}, packed=False) for n in (1, 2))
    (tmp_path / "x.warc").write_bytes(first + b"junk\n" * 3 + b"\x00" * 200_000 + b"\n" + second)
    rows = [row for _, row in rows_of(tmp_path / "x.warc")]
    assert [(row.url, row.error) for row in rows] == [
        ("http://a.test/1.jpg", None),
        (None, "damaged record: neither a record nor the end where one should be"),
        ("http://a.test/2.jpg", None),
    ]


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (b"no http\r\n\r\n<img src=x>", "no HTTP response"),
        (b"HTTP/1.1 abc\r\n\r\n<img src=x>", "no HTTP response"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: rot13\r\nContent-Type: text/html\r\n\r\nx", "content encoding 'rot13'"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Type: text/html\r\n\r\n\xff\xff", "br that cannot be"),
    ],
)
def test_a_damaged_response_is_a_row_with_its_page(block, error):
    head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.test/\r\nContent-Length: %d\r\n\r\n"
    record = head % len(block) + block + b"\r\n\r\n"
    pages = list(read_pages(io.BytesIO(record * 2)))
    assert [place for place, _ in pages] == [1, 2]
    for _, page in pages:
        (row,) = page.images
        assert row.page_url == "http://a.test/"
        assert row.error.startswith(f"damaged record: {error}")


def test_headers_without_an_end_are_left(tmp_path):
    warc = b"WARC/1.0\r\n" + b"X: y\r\n" * 5000 + b"Z: " + b"z" * 3_000_000 + b"\r\n\r\n" + warc_of(PAGES, packed=False)
    (tmp_path / "x.warc").write_bytes(warc)
    rows = [row for _, row in rows_of(tmp_path / "x.warc")]
    assert rows[0].error == "damaged record: its header cannot be read"
    assert [row.url for row in rows[1:]] == [url for _, url, _, _ in FOUND]


@pytest.mark.parametrize("length", ["abc", "-5", "", "9" * 5000, "9" * 19])
def test_a_record_without_a_length_is_passed_over(length):
    record = "WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.test/\r\nContent-Length: {}\r\n\r\n"
    warc = record.format(length).encode() + b"HTTP/1.1 200 OK\r\n\r\n<html>\r\n\r\n" + warc_of(PAGES, packed=False)
    pages = list(read_pages(io.BytesIO(warc)))
    assert pages[0][1].images[0].error == "damaged record: its length is no number"
    assert pages[1][1].images[0].url == FOUND[0][1]
    assert len(pages) == 5


def test_a_bomb_is_a_row():
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = packer.compress(b"<img src=1.jpg>") + packer.compress(bytes(200 << 20)) + packer.flush()
    headers = [("Content-Type", "text/html"), ("Content-Encoding", "gzip")]
    ((_, page),) = read_pages(io.BytesIO(warc_of({"http://a.test/": bomb}, headers=headers)))
    assert [(row.url, row.error) for row in page.images] == [
        ("http://a.test/1.jpg", None),
        (None, "a page of more than 8,388,608 bytes"),
    ]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"{", "not json"),
        (b"[" * 100_000, "not json"),
        (b'"' + b"x" * (9 << 20) + b'"', "metadata of more than 8,388,608 bytes"),
    ],
)
def test_damaged_metadata_is_a_row(data, error):
    head = b"WARC/1.0\r\nWARC-Type: metadata\r\nWARC-Target-URI: http://a.test/\r\nContent-Type: application/json\r\n"
    record = head + b"Content-Length: %d\r\n\r\n" % len(data) + data + b"\r\n\r\n"
    ((_, page),) = read_pages(io.BytesIO(record))
    assert page.images[0].error == f"damaged record: {error}"


def test_a_page_whose_address_is_no_text_can_be_stored():
    """JSON may hold half of a pair of surrogates."""
    html = {"HTML-Metadata": {"Links": [{"path": "IMG@/src", "url": f"{n}.jpg"} for n in range(10_001)]}}
    page_url = {"WARC-Target-URI": "http://a.test/\ud800"}
    metadata = {"WARC-Header-Metadata": page_url, "Payload-Metadata": {"HTTP-Response-Metadata": html}}
    data = json.dumps({"Envelope": metadata}).encode()
    head = b"WARC/1.0\r\nWARC-Type: metadata\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    ((_, page),) = read_pages(io.BytesIO(head % len(data) + data + b"\r\n\r\n"))
    error = "a page with more than 10,000 pictures"
    assert page.images[-1] == SourceRow(None, None, "http://a.test/?", None, None, error)
    assert {row.page_url for row in page.images} == {"http://a.test/?"}


def test_metadata_of_odd_shapes_is_no_page():
    html = {"HTTP-Response-Metadata": {"HTML-Metadata": {"Head": [1], "Links": [3, {"path": 4}, {"path": "IMG@/src"}]}}}
    for envelope in (None, [], {"Payload-Metadata": 3}, {"Payload-Metadata": html}):
        data = json.dumps({"Envelope": envelope}).encode()
        head = b"WARC/1.0\r\nWARC-Type: metadata\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        assert list(read_pages(io.BytesIO(head % len(data) + data))) == []


def test_an_arc_and_one_that_is_cut_off(tmp_path):
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<img src=1.jpg>"
    fields = b"1 0 Test\nURL IP-address Archive-date Content-type Archive-length\n"
    header = b"filedesc://x.arc 0.0.0.0 20260101000000 text/plain %d\n" % len(fields) + fields + b"\n"
    one = b"http://a.test/ 1.2.3.4 20260101000000 text/html %d\n" % len(body) + body + b"\n"
    (tmp_path / "x.arc").write_bytes(header + one + one.replace(b"a.test", b"b.test")[:-10])
    rows = [row for _, row in rows_of(tmp_path / "x.arc")]
    assert [(row.url, row.page_url, row.error) for row in rows] == [
        ("http://a.test/1.jpg", "http://a.test/", None),
        (None, "http://b.test/", "damaged record: it is cut off"),
    ]
    (tmp_path / "x.arc.gz").write_bytes(gzip.compress(header) + gzip.compress(one))
    assert [row.url for _, row in rows_of(tmp_path / "x.arc.gz")] == ["http://a.test/1.jpg"]


# Archives of others


def by_warcio(data):
    """Types of the records, and addresses of the pages; gzip is opened before, since some members hold several."""
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    types, pages = [], []
    for record in ArchiveIterator(io.BytesIO(data)):
        types.append(record.rec_type)
        http = record.http_headers
        url = record.rec_headers.get_header("uri" if record.format == "arc" else "WARC-Target-URI")
        is_html = http is not None and "html" in (http.get_header("content-type") or "")
        if record.rec_type == "response" and is_html and http.get_statuscode().startswith("2"):
            pages.append(url)
        if record.rec_type == "resource" and "html" in record.content_type and url.startswith("http"):
            pages.append(url)
    return types, pages


def test_records_and_pages_of_archives_of_others_are_those_that_warcio_reads(shared_data):
    num_archives = num_pages = 0
    with tarfile.open(shared_data / "urls" / "web_archives.tar") as tar:
        for info in tar:
            if not re.search(r"\.(warc|arc|wat|wet)", info.name) or "paths" in info.name:
                continue
            data = tar.extractfile(info).read()
            num_archives += 1
            try:
                types, pages = by_warcio(data)
            except ArchiveLoadFailed as error:
                raise AssertionError(info.name) from error
            found = [(place, record) for place, record in read_records(io.BytesIO(data))]
            assert [record.rec_type for _, record in found if not isinstance(record, str)] == types, info.name
            damaged = [page for _, page in read_pages(io.BytesIO(data)) if page.images and page.images[-1].error]
            expected = {"warcio__bad.arc": 4, "warcio__example-space-in-url.arc": 1, "warcio__example-trunc.warc": 1}
            assert len(damaged) == expected.get(info.name, 0), info.name
            got = list(read_pages(io.BytesIO(data)))
            assert len(got) - len(damaged) == len(pages), info.name
            num_pages += len(pages)
            if "whirlwind.warc" in info.name and "warc.w" not in info.name:
                ((_, page),) = got
                assert len(page.images) == 25
                assert {row.page_url for row in page.images} == {"https://an.wikipedia.org/wiki/Escopete"}
                # The WAT beside it tells of the request alone, so one is made of the page itself.
                ((_, told),) = [one for one in read_pages(io.BytesIO(wat_of(data))) if one[1].images]
                assert sorted(row.url for row in told.images) == sorted(row.url for row in page.images)
                assert set(told.links) == set(page.links)
    assert (num_archives, num_pages) == (22, 14)
