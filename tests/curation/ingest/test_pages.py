"""Pages of HTML: what is found on them, in which encoding, and that none of them can hold the reader up."""

import subprocess
import sys
import time
import tracemalloc

import pytest

from curation.ingest.encoding import encoding_of, unpacked
from curation.ingest.pages import (
    MAX_ADDRESS_LETTERS,
    MAX_ADDRESSES,
    MAX_DEPTH,
    MAX_LETTERS,
    MAX_PAGE_BYTES,
    Link,
    largest_candidate,
    read_page,
    said_no,
)

PAGE_URL = "http://a.test/blog/post.html"


def page_of(html, content_type="text/html; charset=utf-8", url=PAGE_URL):
    return read_page(html if isinstance(html, bytes) else html.encode(), url, content_type)


def images_of(html, **values):
    return [(row.url, row.alt_text) for row in page_of(html, **values).images]


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ("<img src=1.jpg alt='a &amp; b'>", [("http://a.test/blog/1.jpg", "a & b")]),
        ("<IMG SRC='//b.test/x.png'>", [("http://b.test/x.png", None)]),
        ("<img src=' /a\n b.jpg '>", [("http://a.test/a b.jpg", None)]),
        ("<img src=1.jpg alt=''><img src=1.jpg alt=one><img src=./1.jpg>", [("http://a.test/blog/1.jpg", "one")]),
        ("<img><img src><img src=''><img src=#top>", []),
        ("<img src='data:image/gif;base64,R0lGOD'>", []),
        ("<img src=' DATA:image/gif,x' data-src=late.jpg>", [("http://a.test/blog/late.jpg", None)]),
        ("<img data-src=late.jpg data-srcset='s.jpg 1x, l.jpg 2x' alt=x>", [
            ("http://a.test/blog/late.jpg", "x"), ("http://a.test/blog/l.jpg", "x"),
        ]),
        ("<img src=1.jpg data-src=late.jpg>", [("http://a.test/blog/1.jpg", None)]),
        ("<img src=1.jpg srcset='2.jpg 200w, 3.jpg 300w'>", [
            ("http://a.test/blog/1.jpg", None), ("http://a.test/blog/3.jpg", None),
        ]),
        ("<picture><source srcset='a.avif 1x, b.avif 3x'><source srcset=c.webp><img src=d.jpg alt=dog></picture>", [
            ("http://a.test/blog/b.avif", "dog"), ("http://a.test/blog/c.webp", "dog"),
            ("http://a.test/blog/d.jpg", "dog"),
        ]),
        ("<picture><source srcset=a.avif></picture><img src=b.jpg alt=other>", [
            ("http://a.test/blog/a.avif", None), ("http://a.test/blog/b.jpg", "other"),
        ]),
        ("<video><source src=v.mp4></video>", []),
        ("<meta property='og:image' content='/og.jpg'><meta name='twitter:image' content=t.jpg><meta name=x>", [
            ("http://a.test/og.jpg", None), ("http://a.test/blog/t.jpg", None),
        ]),
        ("<img src=1.jpg><base href='/other/'><base href='/third/'>", [("http://a.test/other/1.jpg", None)]),
        ("<base href='http://b.test'><img src=1.jpg>", [("http://b.test/1.jpg", None)]),
        *(
            (f"<base href='{base}'><base href=/b/><img src=1.jpg>", [("http://a.test/blog/1.jpg", None)])
            for base in ("data:text/html,x", "javascript:0", "ftp://b.test/", "http://[::1/", "http:", "about:blank")
        ),
        (r"<base href='HTTPS:\\b.test\c\d'><img src=1.jpg>", [("https://b.test/c/1.jpg", None)]),
        (r"<img src='\x\1.jpg?a=\b#\c'><img src='..\2.jpg'><img src='\\b.test\3.jpg'><img src='x?\4'>", [
            (r"http://a.test/x/1.jpg?a=\b#\c", None), ("http://a.test/2.jpg", None), ("http://b.test/3.jpg", None),
            (r"http://a.test/blog/x?\4", None),
        ]),
        (r"<img src='http:\\b.test\1.jpg#?\'><img src='ftp://b.test/a\b'>", [
            ("http://b.test/1.jpg#?\\", None), (r"ftp://b.test/a\b", None),
        ]),
        ("<!-- <img src=1.jpg> --><script>'<img src=2.jpg>'</script><noscript><img src=3.jpg></noscript>", [
            ("http://a.test/blog/3.jpg", None),
        ]),
        ("<p><table><img src=1.jpg><b><tr><td><a href=x><img src=2.jpg", [("http://a.test/blog/1.jpg", None)]),
        ("", []),
        ("no tag at all", []),
        ("\x00\x01<img src=1.jpg>", [("http://a.test/blog/1.jpg", None)]),
    ],
)  # fmt: skip
def test_pictures_of_a_page(html, found):
    assert images_of(html) == found


def test_an_address_that_is_none_is_a_row_that_says_so():
    rows = page_of("<img src='http://[::1/x'><img src='http://b c/x'><img src='ftp://b.test/x'>").images
    assert [(row.url, row.error) for row in rows] == [
        ("http://[::1/x", "no address: Invalid IPv6 URL"),
        ("http://b c/x", "a host that cannot be"),
        ("ftp://b.test/x", None),  # screening knows schemes
    ]
    assert {row.page_url for row in rows} == {PAGE_URL}


@pytest.mark.parametrize(
    ("srcset", "largest"),
    [
        ("a.jpg", "a.jpg"),
        ("a.jpg, b.jpg 2x, c.jpg 1.5x", "b.jpg"),
        ("a.jpg 320w,b.jpg 1280w, c.jpg 640w", "b.jpg"),
        ("a.jpg 100w 50h, b.jpg 90w 2x", "a.jpg"),
        ("a,b.jpg 1x, c.jpg 2x", "c.jpg"),
        ("a,b.jpg 3x, c.jpg 2x", "a,b.jpg"),
        ("a.jpg,", "a.jpg"),
        ("data:image/png;base64,AA== 9x, b.jpg 1x", "b.jpg"),
        ("a.jpg 1e400w, b.jpg nanw, c.jpg 2w, d.jpg -5w", "c.jpg"),
        (" , ,, ", None),
        ("", None),
    ],
)
def test_the_largest_of_a_srcset(srcset, largest):
    assert largest_candidate(srcset) == largest


def test_links_and_what_robots_are_told():
    page = page_of(
        "<meta name=ROBOTS content='NoIndex, nofollow ,noimageai'><meta name=googlebot content=noarchive>"
        "<a href=1.html>x</a><a href='1.html#part' rel='external NOFOLLOW'>y</a><a href=2.html rel=nofollow>z</a>"
        "<a name=here><a href='mailto:x@a.test'><a href='javascript:0'><area href='https://b.test/'>"
    )
    assert page.links == (
        Link("http://a.test/blog/1.html", False),  # one link that may be followed is enough
        Link("http://a.test/blog/2.html", True),
        Link("https://b.test/", False),
    )
    assert page.robots_directives == {"noindex", "nofollow", "noimageai"}
    assert said_no(page.robots_directives) == "its page says noimageai"


@pytest.mark.parametrize(("content", "said"), [("1", "its page says tdm-reservation"), ("0", None), ("", None)])
def test_a_reservation_in_the_head_is_heeded_as_the_header_is(content, said):
    assert said_no(page_of(f"<meta name=tdm-reservation content='{content}'>").robots_directives) == said


@pytest.mark.parametrize(
    ("content_type", "html", "encoding", "alt_text"),
    [
        ("text/html; charset=utf-8", "<img src=x alt=ü>".encode(), "utf-8", "ü"),
        ("text/html;charset='Shift_JIS'", "<img src=x alt=犬>".encode("shift_jis"), "cp932", "犬"),
        ("text/html", "<meta charset=gb2312><img src=x alt=狗>".encode("gb2312"), "gb18030", "狗"),
        ("text/html", "<meta content='text/html; charset=koi8-r'><img src=x alt=ы>".encode("koi8-r"), "koi8-r", "ы"),
        ("text/html; charset=nonsense", b"<img src=x alt=\xfc>", "cp1252", "ü"),
        (None, b"<meta charset=utf-16><img src=x alt=a>", "utf-8", "a"),
        (None, "\ufeff<img src=x alt=ü>".encode("utf-16-le"), "utf-16-le", "ü"),
        ("text/html; charset=latin-1", "\ufeff<img src=x alt=ü>".encode(), "utf-8", "ü"),
        ("text/html; charset=latin-1", b"<img src=x alt=\x80>", "cp1252", "€"),
        ("text/html; charset=utf-8", b"<img src=x alt='a\xffb'>", "utf-8", "a\ufffdb"),
        ("text/html; charset=unicode_escape", b"<img src=x alt='\\u0041'>", "utf-8", "\\u0041"),
        ("text/html; charset=zlib", b"<img src=x alt=a>", "utf-8", "a"),
    ],
)  # fmt: skip
def test_encodings(content_type, html, encoding, alt_text):
    assert encoding_of(html, content_type) == encoding
    (row,) = read_page(html, PAGE_URL, content_type).images
    assert row.alt_text == alt_text


def test_a_letter_that_lies_across_pieces_is_whole():
    html = b"<img src=x alt='" + "ü".encode() * 100_000 + b"'>"
    (row,) = read_page(html, PAGE_URL, None).images
    assert row.alt_text == "ü" * MAX_LETTERS


def test_limits_leave_what_was_read_and_say_why():
    deep = page_of("<img src=1.jpg>" + "<b>" * (MAX_DEPTH + 9) + "<img src=2.jpg>")
    assert [(row.url, row.error) for row in deep.images] == [
        ("http://a.test/blog/1.jpg", None), (None, f"a page nested deeper than {MAX_DEPTH}"),
    ]  # fmt: skip
    many = page_of("".join(f"<img src={n}.jpg><a href={n}>" for n in range(MAX_ADDRESSES + 5)))
    assert len(many.images) == MAX_ADDRESSES + 1
    assert len(many.links) == MAX_ADDRESSES
    assert many.images[-1].error == "a page with more than 10,000 pictures"
    often = page_of("<img src=spacer.gif>" * 3 * MAX_ADDRESSES + "<img src=1.jpg>")
    assert [(row.url, row.error) for row in often.images] == [
        ("http://a.test/blog/spacer.gif", None), ("http://a.test/blog/1.jpg", None),
    ]  # fmt: skip
    large = page_of(b"<img src=1.jpg>" + b" " * MAX_PAGE_BYTES + b"<img src=2.jpg>")
    assert [row.error for row in large.images] == [None, "a page of more than 8,388,608 bytes"]
    wide = page_of(b"<p>" + b"\x80" * (MAX_PAGE_BYTES // 2), "text/html; charset=latin-1")  # three bytes each as UTF-8
    assert [row.error for row in wide.images] == ["a page of more than 8,388,608 bytes"]
    long = page_of(f"<img src={'x' * 9000} alt={'y' * 9000}>").images[0]
    assert (len(long.url), len(long.alt_text), long.error) == (8192, 8192, "an address of more than 8,192 letters")


@pytest.mark.parametrize("num_letters", [8100, 1 << 20])
def test_a_long_base_cannot_make_a_short_page_large(num_letters):
    """Nor can one that makes each address too long: it would cost as much to find that out."""
    base = f"<base href='http://a.test/{'b' * num_letters}/'>"
    for tags in ("<img src=i{n}><a href=l{n}>", "<img src=i><a href=l{n}>"):
        html = base + "".join(tags.format(n=n) for n in range(MAX_ADDRESSES))
        tracemalloc.start()
        page = page_of(html)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 2 * MAX_ADDRESS_LETTERS
        assert page.images[-1].error == "a page with addresses of more than 8,388,608 letters in all"
        assert len([*page.images, *page.links]) <= MAX_ADDRESS_LETTERS // num_letters + 1


HOSTILE = {
    "nested": "<b>",
    "nested in tables": "<table><tr><td>",
    "attributes": "<img a='1' b c ",
    "comments": "<!-- ",
    "sections": "<![CDATA[",
    "ends": "</x>",
    "paragraphs": "<p>",
    "references": "&#1",
    "tags that never end": "<",
    "candidates": "<img srcset='a, a, , b 1x,'>",
    "up": "../",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_page_takes_seconds_and_little_memory(name):
    """In a process of its own, whose memory is limited; the time is that of the processor, since others work here."""
    piece = HOSTILE[name]
    start = {"references": "&#", "up": "<img src='"}.get(name, "")
    code = f"""
import resource, time
from curation.ingest.pages import read_page
html = ({start!r} + {piece.replace("&#", "")!r} * ({MAX_PAGE_BYTES} // {len(piece)})).encode()
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
before = time.process_time()
read_page(html, "http://a.test/", "text/html")
print(time.process_time() - before)
"""
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-500:]
    assert float(result.stdout) < 20, f"{time.monotonic() - began:.0f} s in all"


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "br", "zstd"])
def test_content_encodings_and_bombs(coding):
    import zlib

    import brotli
    import pyarrow as pa

    def zstd(data):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()

    def with_wbits(wbits):
        def packed(data):
            packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
            return packer.compress(data) + packer.flush()

        return packed

    pack = {"deflate": with_wbits(15), "br": brotli.compress, "zstd": zstd}.get(coding, with_wbits(31))
    html = "".join(f"<img src={n}.jpg>" for n in range(40_000)).encode()
    assert unpacked(pack(html), coding, 1 << 20) == html
    assert unpacked(html, f" {coding.upper()}", 1 << 20) == html  # archives often hold it unpacked
    assert html.startswith(unpacked(pack(html)[:-3], coding, 1 << 20))
    assert len(unpacked(pack(bytes(64 << 20)), coding, 1 << 20)) <= 17 << 20  # brotli works in large blocks
    if coding == "deflate":
        assert unpacked(with_wbits(-15)(html), coding, 1 << 20) == html


def test_content_encodings_that_cannot_be_read():
    with pytest.raises(ValueError, match="content encoding 'compress' is not known"):
        unpacked(b"x", "compress", 10)
    with pytest.raises(ValueError, match="br that cannot be unpacked"):
        unpacked(b"\xff" * 50, "br", 10)
    with pytest.raises(ValueError, match="gzip that cannot be unpacked"):
        unpacked(b"\x1f\x8b\x08" + b"\xff" * 50, "gzip", 10)
    assert unpacked(b"<p>", "identity", 1) == b"<p>"
