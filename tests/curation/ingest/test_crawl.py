"""Pages of a real server: what is taken of them, where a crawl goes, and where it must not."""

import asyncio
import gzip
import runpy
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from curation.ingest import crawl as crawling
from curation.ingest.archives import read_pages
from curation.ingest.crawl import Crawler, lines_of, to_table, visits_of
from curation.ingest.fetch import FetchConfig
from curation.ingest.frontier import Frontier, Limits
from curation.ingest.outcome import PERMANENT, TRANSIENT
from curation.ingest.pace import HostPace
from curation.ingest.pagefetcher import OF_PAGES
from curation.ingest.pages import MAX_PAGE_BYTES, page_of_body
from curation.ingest.takedown import Rule
from curation.ingest.takedown import Rules as Takedowns
from curation.schema import TABLES
from curation.stage import OutageError

SITE = ("www.site.test", "img.site.test", "site.test", "other.test")
HTML = {"Content-Type": "text/html; charset=utf-8"}


class Site:
    """A site over the loopback server, and crawls of it under the recording guard."""

    def __init__(self, web, contacts, fast_config):
        self.web, self.contacts, self._config = web, contacts, fast_config
        self.resolve = dict.fromkeys(SITE, f"127.0.0.1:{web.port}")
        self.frontier = None

    def page(self, path, body="", host="www.site.test", **headers):
        html = body if isinstance(body, bytes) else body.encode()
        self.web.reply(host, path, html, headers={**HTML, **headers})

    def config(self, **values):
        return self._config(resolve=self.resolve, **values)

    def crawl(self, *seeds, depth=0, max_pages=100, max_pages_per_host=100, refuses=None, taken_down=None, **values):
        config = self.config(**values)
        limits = Limits(depth=depth, max_pages=max_pages, max_pages_per_host=max_pages_per_host)
        self.frontier = Frontier(seeds or ["http://www.site.test/"], limits)
        visits = []
        crawler = Crawler(config, taken_down=taken_down, contact=self.contacts)
        asyncio.run(crawler.crawl(self.frontier, visits.extend, refuses or (lambda url: None)))
        assert self.contacts.refused == []
        return visits

    def asked(self):
        return [f"{host}{path}" for host, path in self.web.requests]


@pytest.fixture
def site(web, contacts, fast_config):
    return Site(web, contacts, fast_config)


def images_of(visits):
    return [line.row.url for line in lines_of(visits) if line.row.error is None]


def ends_of(visits):
    return [(visit.url.removeprefix("http://www.site.test"), visit.reason) for visit in visits]


def test_pictures_of_a_page_by_every_way_it_names_them(site):
    site.page(
        "/a/b.html",
        """<head><base href="/deep/"><meta property="og:image" content="//img.site.test/og.jpg"></head>
        <img src="one.jpg" alt="one &amp; only"><img srcset="s.jpg 100w, l.jpg 200w"><img src="../two.jpg">
        <picture><source srcset="p.webp"><img src="p.jpg" alt="p"></picture><img src="data:image/gif;base64,R0">""",
    )
    (visit,) = site.crawl("http://www.site.test/a/b.html")
    rows = [line.row for line in lines_of([visit])]
    assert [(row.url, row.alt_text) for row in rows] == [
        ("http://img.site.test/og.jpg", None),
        ("http://www.site.test/deep/one.jpg", "one & only"),
        ("http://www.site.test/deep/l.jpg", None),
        ("http://www.site.test/two.jpg", None),
        ("http://www.site.test/deep/p.webp", "p"),
        ("http://www.site.test/deep/p.jpg", "p"),
    ]
    assert {row.page_url for row in rows} == {"http://www.site.test/a/b.html"}
    assert (visit.reason, visit.http_status, visit.num_images, visit.robots) == (None, 200, 6, None)
    assert site.web.agents == {"lvd-curate/1.0"}


def test_links_are_followed_to_their_depth_within_the_domain_and_each_page_once(site):
    site.page("/", '<a href="a">a</a><a href="./a#top">again</a><a href="//img.site.test/">i</a>')
    site.page("/a", '<img src=a.jpg><a href="/">loop</a><a href="b">b</a><a href="http://other.test/">off</a>')
    site.page("/", "<img src=i.jpg><a href='http://WWW.site.test:80/a'>back</a>", host="img.site.test")
    site.page("/b", '<img src=b.jpg><a href="c">c</a>')
    visits = site.crawl(depth=2)
    assert [(visit.url, visit.depth, visit.parent) for visit in visits] == [
        ("http://www.site.test/", 0, None),
        ("http://www.site.test/a", 1, 0),
        ("http://img.site.test/", 1, 0),
        ("http://www.site.test/b", 2, 1),
    ]
    assert images_of(visits) == [
        f"http://{url}.jpg" for url in ("www.site.test/a", "img.site.test/i", "www.site.test/b")
    ]
    assert visits[1].links == ["http://www.site.test/", "http://www.site.test/b"]
    assert visits[1].num_links == 3
    assert len(site.asked()) == 4
    assert len(site.crawl()) == 1


def test_the_order_is_that_of_links_whichever_page_comes_first(site):
    site.page("/", "".join(f"<a href={n}>{n}</a>" for n in range(8)))

    def slow(n):
        async def answer(request):
            from aiohttp import web

            await asyncio.sleep(0.2 if n == 0 else 0.01 * (8 - n))
            return web.Response(text=f"<img src={n}.jpg><a href=/x{n}>", content_type="text/html")

        return answer

    for n in range(8):
        site.web.on("www.site.test", f"/{n}", slow(n))
    visits = site.crawl(depth=2, per_host=8)
    assert images_of(visits) == [f"http://www.site.test/{n}.jpg" for n in range(8)]
    assert [visit.url[-2:] for visit in visits[9:]] == [f"x{n}" for n in range(8)]


def test_what_a_page_says_to_robots(site):
    body = "<img src=x.jpg><a href=next>n</a>"
    site.page("/nofollow", f'<meta name="robots" content="NoFollow">{body}')
    site.page("/header", body, **{"X-Robots-Tag": "nofollow"})
    site.page("/theirs", body, **{"X-Robots-Tag": "otherbot: nofollow"})
    site.page("/rel", "<img src=x.jpg><a rel='ugc nofollow' href=secret>s</a><a href=open>o</a>")
    site.page("/noindex", f'<meta name=robots content="noindex">{body}')
    site.page("/none", f'<meta name=robots content="none">{body}')
    site.page("/noai", body, **{"X-Robots-Tag": "noai"})
    seeds = [
        f"http://www.site.test/{name}" for name in ("nofollow", "header", "theirs", "rel", "noindex", "none", "noai")
    ]
    nofollow, header, theirs, rel, noindex, none, noai = site.crawl(*seeds, respect_opt_out=True)
    picture, following = "http://www.site.test/x.jpg", ["http://www.site.test/next"]
    for visit, links in ((nofollow, []), (header, []), (theirs, following), (rel, ["http://www.site.test/open"])):
        assert images_of([visit]) == [picture]
        assert visit.links == links
    for visit, said, links in ((noindex, "noindex", following), (none, "none", [])):
        (row,) = [line.row for line in lines_of([visit])]
        assert (row.url, row.error) == (picture, f"its page says {said}")  # counted, and not fetched
        assert (visit.directives, visit.links, visit.num_images) == ([said], links, 1)
    assert (noai.reason, noai.opt_out, noai.images) == ("opt_out", "noai", ())
    (row,) = [line.row for line in lines_of([noai])]
    assert (row.url, row.page_url, row.error) == (None, "http://www.site.test/noai", "page not read: opt_out")
    assert len(images_of(site.crawl(*seeds, respect_opt_out=False))) == 7


def test_robots_txt_is_asked_first_and_kept(site):
    site.web.reply("www.site.test", "/robots.txt", b"User-agent: *\nDisallow: /private/\n")
    site.page("/", "<a href=/private/a>p</a><a href=/b>b</a>")
    site.page("/b", "<img src=b.jpg>")
    visits = site.crawl(depth=1, respect_robots=True)
    assert ends_of(visits) == [("/", None), ("/private/a", "robots_denied"), ("/b", None)]
    assert [visit.robots for visit in visits] == ["allowed", "denied", "allowed"]
    assert site.asked()[0] == "www.site.test/robots.txt"
    assert "www.site.test/private/a" not in site.asked()
    assert site.web.asked("/robots.txt") == 1


def test_redirects_within_the_domain_are_followed_and_no_others(site):
    site.web.reply("www.site.test", "/", status=301, headers={"Location": "http://site.test/home"})
    site.page(
        "/home", '<img src="h.jpg"><a href="http://www.site.test/away">a</a><a href="/home">self</a>', host="site.test"
    )
    site.web.reply("www.site.test", "/away", status=302, headers={"Location": "http://other.test/"})
    site.page("/", "<img src=off.jpg>", host="other.test")
    home, away = site.crawl(depth=1)
    assert (home.url, home.final_url) == ("http://www.site.test/", "http://site.test/home")
    assert [line.row.page_url for line in lines_of([home])] == ["http://site.test/home"]
    assert (away.reason, away.images) == ("off_domain", ())
    assert not [url for url in site.asked() if url.startswith("other.test")]


def test_a_page_under_two_addresses_is_read_once(site):
    site.web.reply("www.site.test", "/old", status=301, headers={"Location": "/new"})
    site.page("/new", "<img src=n.jpg><a href=/old>o</a>")
    visits = site.crawl("http://www.site.test/old", "http://www.site.test/new", "http://www.site.test/old#x")
    assert ends_of(visits) == [("/old", None), ("/new", "same_page"), ("/old", "same_page")]
    assert len(list(lines_of(visits))) == 1


def test_private_addresses_and_ports_are_never_contacted(site):
    site.page("/", '<a href="http://10.0.0.1/">p</a><a href="http://www.site.test:22/x">s</a><a href="/r">r</a>')
    site.web.reply("www.site.test", "/r", status=302, headers={"Location": "http://169.254.169.254/latest"})
    visits = site.crawl("http://www.site.test/", "http://127.0.0.1:1/", "http://[::1]/", depth=1)
    assert [visit.reason for visit in visits] == [None, *["forbidden_address"] * 3, "off_domain"]


def test_what_is_no_page_is_a_row(site):
    site.web.reply("www.site.test", "/picture", b"\x89PNG", headers={"Content-Type": "image/png"})
    site.web.reply("www.site.test", "/silent.png", b"\x89PNG", headers={"Content-Type": ""})
    site.page("/damaged", b"\x1f\x8b\x08no gzip", **{"Content-Encoding": "gzip"})
    site.page("/packed", gzip.compress(b"<img src=packed.jpg>"), **{"Content-Encoding": "gzip"})
    site.page("/broken", "<<html><b<img src=x.jpg><p <img src='y.jpg'></html><img src=z.jpg")
    site.page("/empty")
    names = ("picture", "silent.png", "damaged", "packed", "broken", "empty", "gone")
    visits = site.crawl(*(f"http://www.site.test/{name}" for name in names), "not an address")
    assert [visit.reason for visit in visits] == [*["not_a_page"] * 3, None, None, None, "http_4xx", "bad_url"]
    assert images_of(visits)[0] == "http://www.site.test/packed.jpg"
    assert [line.row.error for line in lines_of(visits) if line.row.error] == [
        *["page not read: not_a_page"] * 3,
        "page not read: http_4xx",
        "page not read: bad_url",
    ]


def test_a_page_that_is_too_long_gives_what_came_and_says_so(site):
    html = b"<img src=first.jpg>" + b"<p>text</p>" * (9_000_000 // 11) + b"<img src=last.jpg>"
    site.page("/", html)
    rows = [line.row for line in lines_of(site.crawl(timeout_s=20))]
    assert [(row.url, row.error) for row in rows] == [
        ("http://www.site.test/first.jpg", None),
        (None, f"a page of more than {MAX_PAGE_BYTES:,} bytes"),
    ]


def test_long_pages_do_not_keep_others_waiting(site):
    """They are read beside the event loop: else those that come slowly would end as ``timeout``."""
    html = b"<img src=x alt=y>" * (7_000_000 // 17)
    started = time.perf_counter()
    page_of_body(html, "http://www.site.test/", "text/html")
    reading_s = time.perf_counter() - started
    for n in range(3):
        site.page(f"/{n}", html)
    pauses = []

    async def tick():
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            pauses.append(time.perf_counter() - before)

    async def run():
        ticking = asyncio.create_task(tick())
        frontier = Frontier(
            [f"http://www.site.test/{n}" for n in range(3)], Limits(depth=0, max_pages=9, max_pages_per_host=9)
        )
        visits = []
        config = site.config(timeout_s=20.0)
        await Crawler(config, contact=site.contacts).crawl(frontier, visits.extend, lambda url: None)
        ticking.cancel()
        return visits

    assert [visit.reason for visit in asyncio.run(run())] == [None] * 3
    # Read in the loop, each of the three would stop it; the machine may once.
    assert sorted(pauses)[-3] < reading_s / 2


def test_traps_end_at_the_caps(site):
    async def calendar(request):
        from aiohttp import web

        day = int(request.rel_url.query["day"])
        more = "".join(f'<a href="/cal?day={day + n}">n</a>' for n in range(1, 4))
        return web.Response(
            text=f"{more}<a href='/{'x' * 3000}'>long</a><a href=f.PDF>pdf</a>", content_type="text/html"
        )

    site.web.on("www.site.test", "/cal", calendar)
    visits = site.crawl("http://www.site.test/cal?day=0", depth=1000, max_pages_per_host=12)
    assert [visit.url.rpartition("=")[2] for visit in visits] == [str(day) for day in range(12)]
    assert site.frontier.cut_hosts == {"www.site.test"}
    assert not [url for url in site.asked() if "xxx" in url or "PDF" in url]
    assert len(site.crawl("http://www.site.test/cal?day=0", depth=1000, max_pages=5)) == 5


def test_what_is_blocked_or_taken_down_is_not_asked_for(site):
    site.page("/", "<a href=/bad>b</a><a href=/down>d</a><a href=/good>g</a><a href=/r>r</a>")
    site.page("/good")
    site.web.reply("www.site.test", "/r", status=302, headers={"Location": "/bad"})
    visits = site.crawl(
        depth=1,
        refuses=lambda url: "blocked_url" if url.endswith("/bad") else None,
        taken_down=Takedowns([Rule(kind="url", value="http://www.site.test/down")]),
    )
    assert ends_of(visits)[1:] == [
        ("/bad", "blocked_url"),
        ("/down", "taken_down"),
        ("/good", None),
        ("/r", "blocked_url"),
    ]
    assert not {"www.site.test/bad", "www.site.test/down"} & set(site.asked())


def test_failures_that_pass_are_tried_as_pictures_are(site):
    tries = []

    async def sometimes(request):
        from aiohttp import web

        tries.append(request)
        return (
            web.Response(status=503) if len(tries) < 3 else web.Response(text="<img src=x>", content_type="text/html")
        )

    site.web.on("www.site.test", "/", sometimes)
    site.web.reply("www.site.test", "/broken", status=500)
    visits = site.crawl("http://www.site.test/", "http://www.site.test/broken")
    assert ends_of(visits) == [("/", None), ("/broken", "http_5xx")]
    assert len(tries) == 3


def test_each_part_has_all_the_patience_again_and_no_host_is_asked_sooner():
    async def closed(pace):
        async with pace.turn() as why:
            return why

    async def run():
        pace = HostPace(connections=1, interval_s=50.0, patience_s=100.0)
        first = await closed(pace)
        for _ in range(5):
            pace.refused(None, 429, None)
        refused = await closed(pace)
        pace.renew_patience()
        waiting = asyncio.create_task(closed(pace))
        await asyncio.sleep(0.05)
        still_waits = not waiting.done()
        waiting.cancel()
        return first, refused, still_waits

    assert asyncio.run(run()) == (None, "rate_limited", True)


def test_the_table_gives_the_visits_back(site, monkeypatch):
    monkeypatch.setattr(crawling, "PAGES_IN_PART", 2)
    site.page("/", "<img src=a.jpg alt=a><a href=/1>1</a><a href=/2>2</a><a href=/3>3</a>")
    visits = site.crawl(depth=1)
    table = to_table("s", visits)
    assert table.schema.equals(TABLES["pages"].schema)
    again = list(visits_of(table))
    assert list(lines_of(again)) == list(lines_of(visits))
    assert [visit.links for visit in again] == [list(visit.links) for visit in visits]


def test_a_page_gives_what_an_archive_of_it_gives(site):
    import io

    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    html = "<base href=/b/><img src=ü.jpg alt=x><img data-src=late.jpg><source srcset='s.jpg 1x, l.jpg 2x'>".encode(
        "latin-1"
    )
    headers = [("Content-Type", "text/html; charset=iso-8859-1")]
    site.page("/", html, **dict(headers))
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    http = StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1")
    record = writer.create_warc_record("http://www.site.test/", "response", payload=io.BytesIO(html), http_headers=http)
    writer.write_record(record)
    out.seek(0)
    ((_, page),) = read_pages(out)
    assert [line.row for line in lines_of(site.crawl())] == list(page.images)


# A site, or a name server, that dies


class MortalSite:
    """One site on a loopback port that dies after a number of pages; started again it has the same port.

    Page N leads to two later ones.
    """

    host = "mortal.test"

    def __init__(self, num_pages):
        self.num_pages, self.asked, self.port = num_pages, [], 0
        self.dies_after, self.alive = None, False

    def start(self):
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if site.dies_after is not None and len(site.asked) >= site.dies_after:
                    site.die()
                    return
                found = self.path != "/robots.txt"
                if found:
                    site.asked.append(self.path)
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                if found:
                    n = int(self.path[1:] or 0)
                    links = "".join(f"<a href=/{m}>" for m in (2 * n + 1, 2 * n + 2) if m < site.num_pages)
                    self.wfile.write(f"<img src=/{n}.jpg>{links}".encode())

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port, self.alive = self._server.server_port, True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def die(self):
        if self.dies_after is None:
            return
        self.dies_after = None
        self._server.socket.close()
        threading.Thread(target=self.stop, daemon=True).start()

    def stop(self):
        server, self.alive = self._server, False
        server.shutdown()
        server.server_close()


@pytest.fixture
def mortal(contacts, fast_config):
    site = MortalSite(num_pages=100).start()
    recorder = type(contacts)(site.port)

    def crawl(visits, **values):
        """Crawl, or go on behind these visits; a command of its own each time."""
        config = fast_config(resolve={site.host: f"127.0.0.1:{site.port}"}, respect_robots=True, **values)
        limits = Limits(depth=99, max_pages=1000, max_pages_per_host=1000)
        frontier = Frontier([f"http://{site.host}/"], limits, list(visits))
        asyncio.run(Crawler(config, contact=recorder).crawl(frontier, visits.extend, lambda url: None))

    yield site, crawl
    site.stop()
    assert recorder.refused == []


def test_a_crawl_whose_only_site_dies_stops_and_goes_on_when_it_is_back(mortal, monkeypatch):
    monkeypatch.setattr(crawling, "PAGES_IN_PART", 10)
    site, crawl = mortal
    undisturbed, visits = [], []
    crawl(undisturbed)
    site.asked.clear()
    site.dies_after = 20
    with pytest.raises(OutageError, match=r"\(1 connection\) and hosts reached before cannot be reached now \(mortal"):
        crawl(visits, breaker_patience_s=0.0)
    before = list(visits)
    assert 0 < len(before) <= 20
    assert visits == undisturbed[: len(before)]
    with pytest.raises(OutageError, match=r"1 of the last 1 hosts failed \(1 connection\) and no host was reached"):
        crawl(visits)
    assert visits == before
    site.start()
    crawl(visits)
    assert visits == undisturbed
    # Whoever knows that it is gone for good says so.
    site.stop()
    crawl(gone := [], breaker=False)
    assert ends_of(gone) == [("http://mortal.test/", "connection")]
    site.start()


def test_pages_of_a_short_outage_of_the_only_site_are_visited_when_it_is_over(mortal, back_when_missed):
    """The host was left alone for its failures, and what was seen of it in the outage is forgotten."""
    site, crawl = mortal
    undisturbed, visits = [], []
    crawl(undisturbed)
    site.asked.clear()
    site.dies_after = 40
    back_when_missed(site)
    crawl(visits, breaker_patience_s=20.0)
    assert visits == undisturbed
    assert sorted(site.asked) == sorted(visit.url.removeprefix("http://mortal.test") for visit in visits)


def test_pages_of_a_short_outage_of_the_name_server_are_visited_when_it_is_over(site, nameserver, back_when_missed):
    hosts = [f"h{n}.site{n}.test" for n in range(80)]
    for host in hosts:
        site.page("/", f"<img src={host}.jpg>", host=host)
    site.resolve |= dict.fromkeys(hosts, f"127.0.0.1:{site.web.port}")
    server = nameserver({host: ["127.0.0.1"] for host in hosts})
    server.dies_after = 30
    back_when_missed(server)
    visits = site.crawl(
        *(f"http://{host}/" for host in hosts),
        resolve_checked=True,
        nameservers=[server.place],
        breaker_hosts=20,
        breaker_patience_s=10.0,
    )
    assert [visit.reason for visit in visits] == [None] * 80
    assert site.web.asked("/") == 80  # what had come was not asked for again


def test_whatever_a_server_does_each_page_ends_and_nobody_else_is_contacted(contacts, nameserver):
    hostile = runpy.run_path(str(Path(__file__).parents[2] / "hostile_site.py"))
    site = hostile["HostileSite"]().start()
    try:
        recorder, names = type(contacts)(site.port), nameserver(site.names)
        names.turns[hostile["REBINDS"]] = [["127.0.0.1"], ["169.254.169.254"], ["10.0.0.1"]]
        config = FetchConfig(
            resolve=site.resolve,
            resolve_checked=True,
            nameservers=[names.place],
            per_host_interval_s=0.0,
            backoff_s=0.01,
            timeout_s=0.8,
        )
        seeds = list(dict.fromkeys(url for url, _ in site.rows()))
        visits = []
        frontier = Frontier(seeds, Limits(depth=1, max_pages=1000, max_pages_per_host=5))
        asyncio.run(Crawler(config, contact=recorder).crawl(frontier, visits.extend, lambda url: None))
    finally:
        site.stop()
    assert recorder.refused == []
    assert [visit.seed for visit in visits if visit.depth == 0] == list(range(len(seeds)))
    assert {visit.reason for visit in visits} <= {None, *TRANSIENT, *PERMANENT, *OF_PAGES}
    assert to_table("s", visits).num_rows == len(visits)
