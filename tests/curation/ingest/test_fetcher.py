import asyncio
import gzip
import itertools
import threading
import time
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from curation.ingest.magic import sniff_format
from curation.ingest.pace import backoff_s, retry_after_s


def later(web, host, path, first, then):
    """Answer in one way ``len(first)`` times, in another from then on."""
    from aiohttp import web as aio

    left = list(first)

    async def handler(request):
        status, headers = left.pop(0) if left else (200, {})
        return aio.Response(status=status, headers=headers, body=then if status == 200 else b"")

    web.on(host, path, handler)


def stream(web, host, path, pieces, *, pause_s=0.0, length=None, abort=False):
    """Send a body piece by piece; ``sent`` counts what went out."""
    from aiohttp import web as aio

    sent = []

    async def handler(request):
        response = aio.StreamResponse()
        if length is not None:
            response.content_length = length
        else:
            response.enable_chunked_encoding()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            sent.append(len(piece))
            await asyncio.sleep(pause_s)
        if abort:
            request.transport.close()
        else:
            await response.write_eof()
        return response

    web.on(host, path, handler)
    return sent


def gaps_s(outcomes):
    """Seconds between requests as they went out: when a server notices them is also a matter of its own pace."""
    started = sorted(hop.started_at.timestamp() for outcome in outcomes for hop in outcome.hops)
    return [after - before for before, after in itertools.pairwise(started)]


def test_a_picture(fetch, web, make_picture):
    web.reply("a.test", "/a%20b.png", make_picture(), headers={"Content-Type": "text/html; charset=x"})
    (outcome,) = fetch("http://A.test:80/a b.png#top", contact="mail@example.org")
    assert outcome.reason is None
    assert outcome.body == make_picture()
    assert (outcome.format, outcome.http_status, outcome.robots) == ("png", 200, None)
    assert outcome.content_type == "text/html; charset=x"
    assert outcome.final_url == "http://a.test/a%20b.png#top"
    assert [hop.outcome for hop in outcome.hops] == ["ok"]
    assert outcome.hops[0].address == f"127.0.0.1:{web.port}"
    assert web.agents == {"lvd-curate/1.0 (+mail@example.org)"}


@pytest.mark.parametrize(
    ("status", "reason", "transient", "visits"),
    [(404, "http_4xx", False, 1), (410, "http_4xx", False, 1), (500, "http_5xx", True, 3), (503, "http_5xx", True, 3)],
)
def test_statuses(fetch, web, status, reason, transient, visits):
    web.reply("a.test", "/x", status=status)
    (outcome,) = fetch("http://a.test/x")
    assert (outcome.reason, outcome.transient, outcome.http_status) == (reason, transient, status)
    assert len(web.requests) == len(outcome.hops) == visits
    assert [hop.attempt for hop in outcome.hops] == list(range(1, visits + 1))


def test_a_server_that_recovers(fetch, web, make_picture):
    later(web, "a.test", "/x", [(500, {}), (503, {})], make_picture())
    (outcome,) = fetch("http://a.test/x")
    assert outcome.reason is None
    assert [hop.outcome for hop in outcome.hops] == ["http_5xx", "http_5xx", "ok"]


def test_retry_after_is_waited_for(fetch, web, make_picture):
    later(web, "a.test", "/x", [(429, {"Retry-After": "1"})], make_picture())
    (outcome,) = fetch("http://a.test/x")
    assert outcome.reason is None
    assert web.times[1] - web.times[0] >= 1.0


def test_a_long_retry_after_is_not(fetch, web):
    web.reply("a.test", "/x", status=429, headers={"Retry-After": "3600"})
    started = time.monotonic()
    (outcome,) = fetch("http://a.test/x")
    assert (outcome.reason, outcome.transient, outcome.http_status) == ("rate_limited", True, 429)
    assert len(web.requests) == 1
    assert time.monotonic() - started < 60


def test_a_host_that_refuses_and_refuses_is_left_alone(fetch, web):
    paths = [f"/{n}" for n in range(20)]
    for path in paths:
        web.reply("a.test", path, status=429, headers={"Retry-After": "3600"})
    outcomes = fetch(*(f"http://a.test{path}" for path in paths), per_host=1)
    assert {(outcome.reason, outcome.http_status) for outcome in outcomes} == {("rate_limited", 429)}
    assert len(web.requests) == 5


def test_retry_after_values():
    assert retry_after_s("17") == 17
    assert retry_after_s(format_datetime(datetime.now(UTC) + timedelta(seconds=100))) == pytest.approx(100, abs=3)
    assert retry_after_s(format_datetime(datetime.now(UTC) - timedelta(seconds=100))) == 0
    assert retry_after_s("soon") is None
    for odd in ("Wed, 21 Oct 99999999999 07:28:00 GMT", "Wed, 21 Oct 2026 07:28:00 +9999999999999"):
        assert retry_after_s(odd) is None
    assert retry_after_s(None) is None


def test_backoff_doubles_and_is_seeded():
    waits = [backoff_s("http://a.test/x", attempt, 1.0) for attempt in (1, 2, 3)]
    assert waits == [backoff_s("http://a.test/x", attempt, 1.0) for attempt in (1, 2, 3)]
    assert all(0.5 * 2**n <= wait < 1.5 * 2**n for n, wait in enumerate(waits))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(fetch, web, make_picture, status):
    web.reply("a.test", "/one", status=status, headers={"Location": "http://b.test/two"})
    web.reply("b.test", "/two", status=status, headers={"Location": "/three?x=1"})
    web.reply("b.test", "/three", make_picture())
    web.answers["b.test", "/three?x=1"] = web.answers["b.test", "/three"]
    (outcome,) = fetch("http://a.test/one")
    assert (outcome.reason, outcome.final_url) == (None, "http://b.test/three?x=1")
    assert [hop.outcome for hop in outcome.hops] == ["redirect", "redirect", "ok"]


def test_redirects_that_never_end(fetch, web):
    web.reply("a.test", "/x", status=302, headers={"Location": "/x"})
    (outcome,) = fetch("http://a.test/x", max_redirects=3)
    assert (outcome.reason, outcome.transient) == ("too_many_redirects", False)
    assert len(web.requests) == 4


# yarl raises IndexError, and for the last one, where it is joined to another, ValueError when its host is asked for.
ODD_ADDRESSES = ["http://[x]@/", "http://u:[p]@/", "http://[::1]@/", "http://[64:ff9b:]/x.png"]


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://a.test/x", "http://[::1/x", "javascript:x", "//[a]@/x", *ODD_ADDRESSES]
)
def test_redirects_out_of_the_web(fetch, web, target):
    web.reply("a.test", "/x", status=302, headers={"Location": target})
    assert fetch("http://a.test/x")[0].reason == "bad_url"


@pytest.mark.parametrize("url", ODD_ADDRESSES)
def test_odd_addresses_are_a_failure_class(fetch, url):
    assert fetch(url)[0].reason == "bad_url"


@pytest.mark.parametrize("target", ["//[a]@/x", *ODD_ADDRESSES])
def test_robots_that_redirect_to_an_odd_address_are_none(fetch, web, make_picture, target):
    web.reply("a.test", "/robots.txt", status=302, headers={"Location": target})
    web.reply("a.test", "/x", make_picture())
    (outcome,) = fetch("http://a.test/x", respect_robots=True)
    assert (outcome.reason, outcome.robots) == (None, "none")


def test_opt_out_is_seen_before_the_body(fetch, web, make_picture):
    from aiohttp import web as aio

    waits = [True, False]
    hung_up = threading.Event()

    async def handler(request):
        response = aio.StreamResponse(headers={"X-Robots-Tag": "noai"})
        await response.prepare(request)
        if waits.pop(0):
            while request.transport is not None and not request.transport.is_closing():
                await asyncio.sleep(0.01)
            hung_up.set()
        else:
            await response.write(make_picture())
        return response

    web.on("a.test", "/x", handler)
    (outcome,) = fetch("http://a.test/x")
    assert (outcome.reason, outcome.opt_out, outcome.body) == ("opt_out", "noai", None)
    assert hung_up.wait(30)
    assert fetch("http://a.test/x", respect_opt_out=False)[0].reason is None


def test_a_drip_ends_at_the_time_limit_and_is_not_repeated(fetch, web, make_picture):
    sent = stream(web, "a.test", "/x", [bytes([byte]) for byte in make_picture()], pause_s=0.4)
    started = time.monotonic()
    (outcome,) = fetch("http://a.test/x", timeout_s=2)
    assert (outcome.reason, outcome.transient) == ("timeout", True)
    assert time.monotonic() - started > 1.9
    assert 0 < sum(sent) < len(make_picture()) / 2
    assert len(web.requests) == 1


def test_a_server_that_says_nothing_is_asked_once_again(fetch, web):
    async def handler(request):
        await asyncio.sleep(0.5)

    web.on("a.test", "/x", handler)
    (outcome,) = fetch("http://a.test/x", timeout_s=0.2, attempts=3)
    assert outcome.reason == "timeout"
    assert [hop.outcome for hop in outcome.hops] == ["timeout", "timeout"]


def test_too_large_by_its_header(fetch, web, make_picture):
    sent = stream(web, "a.test", "/x", [make_picture(), b"\0" * 100_000], pause_s=0.2, length=50_000_000)
    assert fetch("http://a.test/x", max_bytes=200_000)[0].reason == "too_large"
    assert len(sent) <= 1


def test_too_large_by_what_comes(fetch, web, make_picture):
    sent = stream(web, "a.test", "/x", [make_picture(), *[b"\0" * 100_000] * 100], pause_s=0.01)
    (outcome,) = fetch("http://a.test/x", max_bytes=200_000)
    assert (outcome.reason, outcome.body) == ("too_large", None)
    assert len(sent) < 60


def test_compressed_bodies_have_the_same_limit(fetch, web, make_picture):
    bomb = gzip.compress(make_picture() + b"\0" * 5_000_000)
    web.reply("a.test", "/bomb", bomb, headers={"Content-Encoding": "gzip"})
    web.reply("a.test", "/fine", gzip.compress(make_picture()), headers={"Content-Encoding": "gzip"})
    web.reply("a.test", "/odd", make_picture(), headers={"Content-Encoding": "br"})
    bomb_outcome, fine, odd = fetch(*(f"http://a.test/{name}" for name in ("bomb", "fine", "odd")), max_bytes=100_000)
    assert bomb_outcome.reason == "too_large"
    assert fine.body == make_picture()
    assert odd.reason == "not_an_image"


@pytest.mark.parametrize("cut", ["length", "chunked"])
def test_a_body_that_is_cut_off(fetch, web, make_picture, cut):
    data = make_picture(size=(600, 600), kind="BMP")
    length = len(data) if cut == "length" else None
    stream(web, "a.test", "/x", [data[: len(data) // 2]], length=length, abort=True, pause_s=0.05)
    (outcome,) = fetch("http://a.test/x", attempts=3)
    assert (outcome.reason, outcome.transient, outcome.body) == ("truncated_body", True, None)
    assert len(web.requests) == 2


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("num_bytes", [None, -1, 10], ids=["half", "but one", "no letter of it"])
def test_a_packed_body_that_is_cut_off_though_the_answer_is_whole(fetch, web, make_picture, coding, num_bytes):
    packed = {"gzip": gzip.compress, "deflate": zlib.compress}[coding](make_picture(size=(600, 600)))
    cut = packed[: len(packed) // 2 if num_bytes is None else num_bytes]
    web.reply("a.test", "/x", cut, headers={"Content-Encoding": coding})
    (outcome,) = fetch("http://a.test/x", attempts=3)
    assert (outcome.reason, outcome.transient, outcome.body) == ("truncated_body", True, None)
    assert len(web.requests) == 2


@pytest.mark.parametrize(
    ("said", "is_whole"),
    [
        ("bytes 0-{last}/{size}", True),
        ("Bytes  0-{last}/{size}", True),
        ("bytes 0-{last}/*", False),
        ("bytes 0-{last}/999999", False),
        ("bytes 1-{last}/{size}", False),
        ("bytes 0-{last}/" + "9" * 5000, False),
        ("0-{last}/{size}", False),
        (None, False),
    ],
)
def test_a_part_that_nobody_asked_for(fetch, web, make_picture, said, is_whole):
    data = make_picture()
    headers = {} if said is None else {"Content-Range": said.format(last=len(data) - 1, size=len(data))}
    web.reply("a.test", "/x", data, status=206, headers=headers)
    (outcome,) = fetch("http://a.test/x", attempts=3)
    expected = (None, data, 1) if is_whole else ("truncated_body", None, 2)
    assert (outcome.reason, outcome.body, len(web.requests)) == expected


def test_a_part_of_robots_allows_nothing(fetch, web, make_picture):
    web.reply("a.test", "/robots.txt", b"User-agent: *", status=206, headers={"Content-Range": "bytes 0-12/40"})
    web.reply("a.test", "/x", make_picture())
    assert fetch("http://a.test/x", respect_robots=True, attempts=1)[0].reason == "robots_unreachable"
    assert web.asked("/x") == 0


def test_what_is_no_picture_is_not_read_to_its_end(fetch, web):
    sent = stream(web, "a.test", "/x.png", [b"<html>" * 100] * 200, pause_s=0.01)
    (outcome,) = fetch("http://a.test/x.png")
    assert (outcome.reason, outcome.transient) == ("not_an_image", False)
    assert len(sent) < 50
    web.reply("a.test", "/empty", b"")
    assert fetch("http://a.test/empty")[0].reason == "not_an_image"


def test_names_that_do_not_resolve_and_ports_that_do_not_answer(fetch, web, monkeypatch):
    import socket

    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
    resolve = {**web.resolve, "closed.test": f"127.0.0.1:{taken.getsockname()[1]}"}

    async def getaddrinfo(self, host, port, **_):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    (outcome,) = fetch("http://no-such-name.test/x")
    assert (outcome.reason, outcome.transient, len(outcome.hops)) == ("dns", True, 1)
    from curation.ingest.fetch import FetchConfig
    from curation.ingest.fetcher import Fetcher

    async def run():
        config = FetchConfig(resolve=resolve, attempts=2, backoff_s=0.0, respect_robots=False, timeout_s=2)
        async with Fetcher(config) as fetcher:
            return await fetcher.fetch("http://closed.test/x")

    outcome = asyncio.run(run())
    taken.close()
    assert (outcome.reason, outcome.transient, len(outcome.hops)) == ("connection", True, 2)


def test_bad_bytes_in_headers(fetch, web):
    async def handler(request):
        request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/\xff\xfe\r\nContent-Length: 3\r\n\r\nabc")
        await asyncio.sleep(0.1)
        request.transport.close()

    web.on("a.test", "/x", handler)
    (outcome,) = fetch("http://a.test/x", attempts=1)
    assert outcome.reason in ("not_an_image", "connection")
    assert outcome.content_type is None or outcome.content_type.encode()


def test_a_host_is_asked_no_more_often_than_allowed(fetch, web, make_picture):
    active, most = [0], [0]
    from aiohttp import web as aio

    async def handler(request):
        active[0] += 1
        most[0] = max(most[0], active[0])
        await asyncio.sleep(0.05)
        active[0] -= 1
        return aio.Response(body=make_picture())

    for n in range(6):
        web.on("a.test", f"/{n}", handler)
    urls = [f"http://a.test/{n}" for n in range(6)]
    assert all(outcome.reason is None for outcome in fetch(*urls, per_host=2))
    assert most[0] == 2
    assert min(gaps_s(fetch(*urls, per_host=6, per_host_interval_s=0.1))) > 0.09


@pytest.mark.parametrize("asks", [b"Crawl-delay: 0.4", b"Allow: /"])
def test_time_between_requests_is_kept_where_all_places_are_taken(fetch, web, make_picture, asks):
    """Turns that came while other hosts took all places must not go out together."""
    from aiohttp import web as aio

    async def slow(request):
        await asyncio.sleep(0.7)
        return aio.Response(body=make_picture())

    web.reply("a.test", "/robots.txt", b"User-agent: *\n" + asks)
    for n in range(4):
        web.reply("a.test", f"/{n}", make_picture())
        web.on("b.test", f"/{n}", slow)
        web.on("c.test", f"/{n}", slow)
    urls = [f"http://{host}.test/{n}" for n in range(4) for host in "bca"]
    values = {} if b"delay" in asks else {"per_host_interval_s": 0.4}
    outcomes = fetch(*urls, respect_robots=True, concurrency=2, per_host=3, **values)
    assert {outcome.reason for outcome in outcomes} == {None}
    gaps = gaps_s(outcome for outcome in outcomes if "a.test" in outcome.final_url)
    assert len(gaps) == 3
    assert min(gaps) > 0.35


def test_who_waits_for_a_host_keeps_no_others_waiting(fetch, web, make_picture):
    for n in range(4):
        web.reply("a.test", f"/{n}", make_picture())
        web.reply("b.test", f"/{n}", make_picture())
    urls = [f"http://{host}.test/{n}" for n in range(4) for host in "ab"]
    outcomes = fetch(*urls, concurrency=1, per_host=4, per_host_interval_s=1.0)
    assert {outcome.reason for outcome in outcomes} == {None}
    assert sum(gaps_s(outcomes)) < 5  # three pauses of each at the same time: one after the other they take six seconds


def test_a_host_is_one_with_and_without_its_port(fetch, web, make_picture):
    web.reply("a.test", "/x", make_picture())
    location = {"Location": "http://a.test:80/x"}
    for n in range(3):
        web.reply("a.test", f"/{n}", status=302, headers=location)
    gaps = gaps_s(fetch(*(f"http://a.test/{n}" for n in range(3)), per_host_interval_s=0.2))
    assert len(gaps) == 5
    assert min(gaps) > 0.15


def test_a_host_is_one_whoever_asks(fetch, web, make_picture):
    web.reply("a.test", "/x", make_picture())
    gaps = gaps_s(fetch(*(f"http://{user}a.test/x" for user in ("", "u@", "v:w@")), per_host_interval_s=0.2))
    assert len(gaps) == 2
    assert min(gaps) > 0.15


def test_crawl_delay_is_kept(fetch, web, make_picture):
    web.reply("a.test", "/robots.txt", b"User-agent: *\nCrawl-delay: 0.2\n")
    for n in range(3):
        web.reply("a.test", f"/{n}", make_picture())
    gaps = gaps_s(fetch(*(f"http://a.test/{n}" for n in range(3)), respect_robots=True))
    assert len(gaps) == 2
    assert min(gaps) > 0.15


def test_a_host_that_asks_for_long_pauses_is_not_asked(fetch, web, make_picture):
    web.reply("a.test", "/robots.txt", b"User-agent: *\nCrawl-delay: 3600\nDisallow: /no\n")
    web.reply("a.test", "/x", make_picture())
    started = time.monotonic()
    one, two, denied = fetch("http://a.test/x", "http://a.test/y", "http://a.test/no", respect_robots=True)
    assert (one.reason, one.transient, one.robots) == ("crawl_delay", False, "allowed")
    assert (two.reason, denied.reason) == ("crawl_delay", "robots_denied")
    assert web.requests == [("a.test", "/robots.txt")]
    assert time.monotonic() - started < 60


def test_a_host_gets_no_more_time_than_there_is_for_it(fetch, web, make_picture):
    """Rows whose turn would come too late are not waited for."""
    for n in range(20):
        web.reply("a.test", f"/{n}", make_picture())
    urls = (f"http://a.test/{n}" for n in range(20))
    reasons = [outcome.reason for outcome in fetch(*urls, per_host_interval_s=0.2, per_host_patience_s=0.7)]
    assert set(reasons) == {None, "host_busy"}
    assert reasons.count(None) <= 4  # at 0, 0.2, 0.4, 0.6 s; fewer where the machine stood still


def test_a_host_that_never_ends_an_answer_is_left_alone(fetch, web, make_picture):
    """A hundred rows of a host that drips cost ten time limits, shared by its two connections."""
    for n in range(100):
        stream(web, "a.test", f"/{n}", [bytes([byte]) for byte in make_picture()], pause_s=0.1)
    outcomes = fetch(*(f"http://a.test/{n}" for n in range(100)), timeout_s=0.3)
    assert {outcome.reason for outcome in outcomes} == {"timeout"}
    assert 10 <= len(web.requests) <= 12


def test_headers_that_mattered_are_kept_of_every_visit(fetch, web, make_picture):
    web.reply("a.test", "/go", status=302, headers={"Location": "/x", "X-Other": "1"})
    told = {"Content-Type": "image/png", "ETag": '"7"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    web.reply("a.test", "/x", make_picture(), headers=told)
    web.reply("a.test", "/no", b"", headers={"X-Robots-Tag": "nofollow, noai" + " " * 600})
    web.reply("a.test", "/wait", status=429, headers={"Retry-After": "3600"})
    followed, denied, late = fetch("http://a.test/go", "http://a.test/no", "http://a.test/wait")
    first, last = (dict(hop.headers) for hop in followed.hops)
    assert first["location"] == "/x"
    assert "x-other" not in first
    assert last["etag"] == '"7"'
    assert last["last-modified"] == "Thu, 01 Jan 2026 00:00:00 GMT"
    assert last["content-length"] == str(len(make_picture()))
    assert dict(denied.hops[0].headers)["x-robots-tag"].strip() == "nofollow, noai"
    assert dict(late.hops[0].headers)["retry-after"] == "3600"


@pytest.mark.parametrize("contact", ["a\r\nX-Evil: 1", "a\nb", "a\n", "naïve", "a\x00"])
def test_a_contact_cannot_smuggle_a_header(contact):
    from curation.ingest.fetch import FetchConfig

    with pytest.raises(ValueError, match="contact"):
        FetchConfig(contact=contact)
    with pytest.raises(ValueError, match="agent"):
        FetchConfig(agent=contact)
    assert FetchConfig(contact="https://example.org/bot").user_agent == "lvd-curate/1.0 (+https://example.org/bot)"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
def test_formats_are_told_from_bytes(make_picture, kind):
    assert sniff_format(make_picture(kind=kind)[:64]) == kind.lower()


def test_what_is_no_format():
    for data in (b"", b"BM", b"BMW is a make of car and no picture", b"RIFF1234WAVE", b"\0\0\0\x20ftypmp42", b"<svg/>"):
        assert sniff_format(data) is None
    assert sniff_format(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") == "heif"
    assert sniff_format(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf") == "avif"
    assert sniff_format(b"\0\0\0\x0cJXL \r\n\x87\n") == "jxl"


_PIECES = ("http://", "https://", "//", "[", "]", ":", "::", "@", "%", "%25", "/", "\\", "?", "#", ".", "..", "0x7f")
_PIECES += (
    "64:ff9b:",
    "::ffff:",
    "127.0.0.1",
    "a.test",
    "xn--",
    "é",
    "①",
    "\u202e",
    "\x00",
    " ",
    "-",
    "_",
    "80",
    "1e9",
)


@pytest.mark.parametrize("redirected", [False, True], ids=["direct", "redirected"])
def test_whatever_an_address_is_made_of_it_is_a_row(fast_config, web, monkeypatch, redirected):
    """Nothing is raised, whatever a seed put together; no name is looked up, and nobody but the server contacted."""
    import random
    import socket

    from curation.ingest.fetcher import Fetcher
    from curation.ingest.outcome import PERMANENT, TRANSIENT

    draw = random.Random(7)
    texts = ["http://" * (n % 2) + "".join(draw.choices(_PIECES, k=draw.randint(1, 7))) for n in range(600)]
    texts = [text for text in (*texts, *ODD_ADDRESSES) if not redirected or "\x00" not in text]
    if redirected:
        for n, text in enumerate(texts):
            web.reply("a.test", f"/{n}", status=302, headers={"Location": text})

    async def getaddrinfo(self, host, port, **_):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    def only_the_server(address, port):
        if (address, port) != ("127.0.0.1", web.port):
            raise OSError(f"no test contacts {address}:{port}")

    async def run():
        config = fast_config(attempts=1, respect_robots=True, per_host=16)
        async with Fetcher(config, contact=only_the_server) as fetcher:
            urls = [f"http://a.test/{n}" for n in range(len(texts))] if redirected else texts
            return await asyncio.gather(*(fetcher.fetch(url) for url in urls))

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    assert {outcome.reason for outcome in asyncio.run(run())} <= {*TRANSIENT, *PERMANENT}
