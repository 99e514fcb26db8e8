import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from curation.ingest import address
from curation.ingest.address import AddressError, canonical_url, parse_address
from curation.ingest.spelling import spelled

HOSTILE = [
    "",
    " ",
    "http://",
    "http:///x",
    "http://a.test",
    "http://a.test?x",
    "http://a.test/",
    "http://a.test/?",
    "http://a.test/?#",
    "http://a.test/#",
    "http://a.test/x#?y",
    "http://a.test./x",
    "http://a.test../x",
    "http://.a.test/x",
    "http://-a.test/x",
    "http://a_b.test/x",
    "http://A.test/x",
    "HTTP://a.test/x",
    "https://a.test:443/x",
    "https://a.test:80/x",
    "http://a.test:/x",
    "http://a.test:99999/x",
    "http://u:p@a.test/x",
    "http://@a.test/x",
    "http://a.test/./x",
    "http://a.test/x/.",
    "http://a.test/x/..",
    "http://a.test/../x",
    "http://a.test/.../x",
    "http://a.test/.x/..y/z..",
    "http://a.test/x?y=/../z",
    "http://a.test/%7Ex",
    "http://a.test/%7ex",
    "http://a.test/%2f%2F",
    "http://a.test/%41%5a%5A%30%39%2D%2E%5F",
    "http://a.test/%2e%2e/x",
    "http://a.test/%",
    "http://a.test/%4",
    "http://a.test/%zz",
    "http://a.test/%25",
    "http://a.test/%00",
    "http://a.test/%FF%ff",
    "http://a.test/a b",
    "http://a.test/a ",
    "\ufeffhttp://a.test/a",
    "http://a.test/a\u2003",
    "http://a.test/a\n",
    "http://a.test/a\x7f",
    "http://a.test/\u00fc?\u00fc",
    "http://b\u00fccher.test/x",
    "http://a\u3002test/x",
    "http://a.test\u3002/x",
    "http://a.test\uff0e/x",
    "http://a.test\uff61/x",
    "http://a.test\u3002./x",
    "http://\u3002/x",
    "http://a.test\\x",
    "http://a.test/x\\y",
    "http://a.test/x[1]",
    "http://[::1]/x",
    "http://[::1/x",
    "http://[v1.x]/x",
    "http://a.test/x;y=1",
    'http://a.test/x|y^z`{}"<>',
    "http://a.test/?x|y^z`{}\"<>'",
    "http://a.test//x//y",
    "http://a.test/x??y",
    "ftp://A.test/x",
    "data:image/png;base64,xx",
    "//a.test/x",
    "a.test/x",
    "http:a.test/x",
    "http:/a.test/x",
    "httpss://a.test/x",
    "https://a.test/\ud7ff",
    "http://xn--a/x",
    "http://xn--/x",
    "http://1.2.3.4/x",
    "http://0x7f.1/x",
    "http://a..b/x",
    "http://a.test/x\\",
    "http://" + "a" * 100_000,
    "http://" + "a." * 50_000 + "/" + "/." * 50_000,
    "http://a.test/" + "%2" * 50_000,
]


def by_one(url):
    try:
        one = parse_address(url)
        return canonical_url(url), one.scheme, one.host
    except AddressError:
        return None, None, None


def apart(url):
    """What taking it apart says, without the shortcut."""
    try:
        return address._parse(url)
    except AddressError as error:
        return str(error)


def check(urls):
    found = spelled(pa.array(urls, pa.string()))
    for url, *columns in zip(urls, *(column.to_pylist() for column in found), strict=True):
        assert tuple(columns) == (by_one(url) if url is not None else (None,) * 3), url
        try:
            quick = parse_address(url or "")
        except AddressError as error:
            quick = str(error)
        assert quick == apart(url or ""), url


def test_hostile_addresses_by_both_ways():
    check([*HOSTILE, None])
    assert spelled(pa.array([], pa.string())).canonical.to_pylist() == []


def test_every_escape_by_both_ways():
    check([f"http://a.test/x%{code:02{case}}y" for code in range(256) for case in "xX"])
    check([f"http://a.test/{place}{chr(code)}y" for code in range(1, 0x180) for place in ("x", "x?", "?x", "x#", "")])


def test_a_canonical_spelling_is_its_own():
    for url in HOSTILE:
        canonical = by_one(url)[0]
        if canonical is not None and "a.test.." not in url:  # of empty labels only the last goes
            assert canonical_url(canonical) == canonical
            assert spelled(pa.array([canonical])).canonical.to_pylist() == [canonical]


@pytest.mark.parametrize("dot", [".", "\u3002", "\uff0e", "\uff61"])
def test_the_dot_behind_a_host_goes_however_it_is_written(dot):
    check([url := f"http://bad.test{dot}/x.jpg"])
    assert by_one(url) == ("http://bad.test/x.jpg", "http", "bad.test")


_ESCAPES = ["%2e", "%2F", "%7E", "%c3", "%"]
_PIECES = st.sampled_from(
    [*"?#:@aB[] \\\u00fc\u3002\t_-~1^.", "/", "//", "..", "/./", "/../", *_ESCAPES, ":80", ":443", "http", "xn--"]
)


@settings(max_examples=400)
@given(
    st.sampled_from(["http://", "https://", "HTTP://", "ftp://", "", "http:"]),
    st.text(string.ascii_lowercase + "A0-_.", max_size=6),
    st.lists(_PIECES | st.text(max_size=2), max_size=8),
)
@example("http://", "a", ["/", "\u0085"])
def test_any_text_by_both_ways(scheme, host, pieces):
    check([scheme + host + "".join(pieces)])


def test_real_lists_by_both_ways(shared_data):
    urls = []
    for path in sorted((shared_data / "urls").glob("*.parquet")):
        table = pq.read_table(path)
        urls += next(table[name].to_pylist() for name in table.column_names if name.lower() == "url")
    for path in sorted((shared_data / "urls").glob("*.txt")):
        urls += path.read_text().splitlines()
    assert len(urls) > 1000
    check(urls)
    check([url.upper() for url in urls if url])
