import asyncio
import gzip
import zlib

import pytest

from curation.ingest import robots
from curation.ingest.robots import Reply, opt_out, parse_reply

AGENT = "lvd-curate"
ALL = "User-agent: *\nDisallow: /\n"


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"X-Robots-Tag": "noai"}, "noai"),
        ({"x-robots-tag": "NoImageAI"}, "noimageai"),
        ({"X-Robots-Tag": "nofollow, noimageindex"}, "noimageindex"),
        ({"X-Robots-Tag": "noml"}, "noml"),
        ({"X-Robots-Tag": "none"}, "none"),
        ({"X-Robots-Tag": "lvd-curate: noindex"}, "noindex"),
        ({"X-Robots-Tag": "LVD-Curate: nofollow, noai"}, "noai"),
        ({"X-Robots-Tag": "*: noai"}, "noai"),
        ({"X-Robots-Tag": "googlebot: noindex"}, None),
        ({"X-Robots-Tag": "googlebot: nofollow, noai"}, None),
        ({"X-Robots-Tag": "googlebot: noindex, lvd-curate: noai"}, "noai"),
        ({"X-Robots-Tag": "unavailable_after: 25 Jun 2030 15:00:00 PST, noai"}, "noai"),
        ({"X-Robots-Tag": "unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noai"}, "noai"),
        ({"X-Robots-Tag": "googlebot: unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noai"}, None),
        ({"X-Robots-Tag": "max-image-preview: large"}, None),
        ({"X-Robots-Tag": "noaiaiai"}, None),
        ({"TDM-Reservation": "1"}, "tdm-reservation"),
        ({"tdm-reservation": "0"}, None),
        ({}, None),
    ],
)
def test_headers_that_forbid_use(headers, found):
    assert opt_out(headers.items(), AGENT) == found


@pytest.mark.parametrize(
    ("reply", "state", "failure"),
    [
        (Reply(200, ALL.encode()), "denied", None),
        (Reply(200, b"User-agent: other\nDisallow: /\n"), "allowed", None),
        (Reply(200, b"User-agent: *\nAllow: /\n\nUser-agent: lvd-curate\nDisallow: /\n"), "denied", None),
        (Reply(200, b"\xef\xbb\xbf" + ALL.encode()), "denied", None),
        (Reply(200, ALL.encode("utf-16")), "denied", None),
        (Reply(200, b"\xfe\xff" + ALL.encode("utf-16-be")), "denied", None),
        (Reply(200, b"\xff\xfe<html>not robots</html>"), "allowed", None),
        (Reply(200, b"#" * robots.MAX_ROBOTS_BYTES + b"\n" + ALL.encode()), "allowed", None),
        (Reply(404, b""), "none", None),
        (Reply(403, b""), "none", None),
        (Reply(429, b""), "unreachable", "robots_unreachable"),
        (Reply(503, b""), "unreachable", "robots_unreachable"),
        (Reply(0, b"", "timeout"), "unreachable", "robots_unreachable"),
        (Reply(0, b"", "dns"), "unreachable", "dns"),
        (Reply(0, b"", "forbidden_address"), "unreachable", "forbidden_address"),
    ],
)
def test_what_an_answer_means(reply, state, failure):
    rules = parse_reply(reply, AGENT)
    assert (rules.judge("http://a.test/x.png"), rules.failure) == (state, failure)


@pytest.mark.parametrize("nl", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("groups", "state"),
    [
        (("lvd-curate/1.0", "Disallow: /"), "denied"),
        (("LVD-Curate/1.0 (+https://example.org)", "Disallow: /"), "denied"),
        (("lvd-curate # us", "Disallow: /"), "denied"),
        (("lvd-curate*", "Disallow: /"), "denied"),
        (("*lvd-curate*", "Disallow: /"), "denied"),
        (("lvd", "Allow: /", "*", "Disallow: /"), "denied"),
        (("curate", "Allow: /", "*", "Disallow: /"), "denied"),
        (("lvd-curate-images", "Allow: /", "*", "Disallow: /"), "denied"),
        (("lvd-curate2", "Allow: /", "*", "Disallow: /"), "denied"),
        (("lvd", "Disallow: /"), "allowed"),
        (("lvd-curate2", "Disallow: /"), "allowed"),
        (("*bot2", "Disallow: /"), "allowed"),
        (("lvd-curate", "Allow: /", "*", "Disallow: /"), "allowed"),
        (("lvd-curate", "Disallow:", "*", "Disallow: /"), "allowed"),
        (("lvd-curate", "Allow: /y", "other", "Allow: /", "LVD-CURATE", "Disallow: /x"), "denied"),
        (("*", "Allow: /y", "other", "Allow: /", "*", "Disallow: /x"), "denied"),
    ],
)
def test_groups_are_chosen_by_whole_names_in_any_case(groups, state, nl):
    text = nl.join(f"User-agent: {line}" if n % 2 == 0 else line for n, line in enumerate(groups))
    assert parse_reply(Reply(200, text.encode()), AGENT).judge("http://a.test/x.png") == state


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("User-agent: other\nUser-agent: lvd-curate\nDisallow: /", "denied"),
        ("User-agent: lvd-curate\nUser-agent: other\nDisallow: /", "denied"),
        ("User-agent: lvd-curate\n\n# and\nSitemap: http://a.test/s\nUser-agent: other\nDisallow: /", "denied"),
        ("User-agent: lvd-curate\nCrawl-delay: 1\nUser-agent: other\nDisallow: /", "allowed"),
        ("User-agent: lvd-curate\nNoindex: /y\nUser-agent: other\nDisallow: /", "allowed"),
        ("Disallow: /\nUser-agent: other\nAllow: /", "allowed"),
        ("useragent lvd-curate\ndissalow /", "denied"),
        ("User agent: *\nDISALLOW : /", "denied"),
        ("\nUser-agent:\nDisallow: /", "allowed"),
    ],
)
def test_what_belongs_to_a_group(text, state):
    assert parse_reply(Reply(200, text.encode()), AGENT).judge("http://a.test/x.png") == state


def test_many_names_and_rules_cost_what_the_rules_for_us_cost():
    """Each name of a group had all its rules to itself: 113 kB of robots.txt took a gigabyte and a quarter minute."""
    import time
    import tracemalloc

    names = "".join(f"User-agent: bot{n}\n" for n in range(3000))
    text = names + "User-agent: *\n" + "".join(f"Disallow: /{n}\n" for n in range(5000))
    tracemalloc.start()
    started = time.process_time()
    rules = parse_reply(Reply(200, text.encode()), AGENT)
    assert (rules.judge("http://a.test/4999x"), rules.judge("http://a.test/x")) == ("denied", "allowed")
    assert time.process_time() - started < 3
    kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept_bytes < rules.num_bytes < 4_000_000
    assert peak_bytes < 8_000_000


@pytest.mark.parametrize("rule", ["Disallow: /{}x", "Disallow: /*{}*x", "Allow: /*{}$"])
def test_of_many_rules_none_is_forgotten(rule):
    """Up to a number all are kept, also those at the end of the longest file; beyond it nothing is asked for."""
    from curation.ingest.robots import MAX_ROBOTS_BYTES

    def rules_of(num):
        text = "\n".join(["User-agent: *", *(rule.format(n) for n in range(num)), "Disallow: /no"])
        text = text.rjust(MAX_ROBOTS_BYTES, "\n")
        return parse_reply(Reply(200, text.encode()), AGENT)

    few, many = rules_of(3_000), rules_of(25_000)
    assert [few.judge(f"http://a.test/{name}") for name in ("yes", "no")] == ["allowed", "denied"]
    assert [many.judge(f"http://a.test/{name}") for name in ("yes", "no")] == ["denied", "denied"]
    assert many.parsed is None


def test_a_rule_that_is_repeated_is_one():
    text = "User-agent: *\n" + "Allow: /q\n" * 40_000 + "Crawl-delay: 3\nCrawl-delay: 2\nCrawl-delay: 3\nDisallow: /"
    rules = parse_reply(Reply(200, text.encode()), AGENT)
    assert [rules.judge(f"http://a.test/{name}") for name in ("q", "x")] == ["allowed", "denied"]
    assert rules.delay_s() == 3
    assert rules.num_bytes < 5_000


def raw_deflate(data):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("body", "coding", "reason"),
    [
        (ALL.encode(), "br", "robots_unreachable"),
        (gzip.compress(ALL.encode()), "gzip, identity", "robots_unreachable"),
        (raw_deflate(ALL.encode()), "deflate", "robots_unreachable"),
        (gzip.compress(ALL.encode())[:-9], "gzip", "robots_unreachable"),
        (gzip.compress(b"# nothing\n") + gzip.compress(ALL.encode()), "gzip", "robots_unreachable"),
        (ALL.encode(), "gzip", "robots_unreachable"),
        (gzip.compress(ALL.encode()), "gzip", "robots_denied"),
        (zlib.compress(ALL.encode()), "deflate", "robots_denied"),
        (ALL.encode(), "Identity", "robots_denied"),
        (gzip.compress(b"#" * robots.MAX_ROBOTS_BYTES + b"\n" + ALL.encode()), "gzip", None),  # the cut
    ],
    ids=["br", "two", "raw deflate", "cut short", "two members", "not gzip", "gzip", "deflate", "plain", "first bytes"],
)
def test_robots_that_cannot_be_unpacked_allow_nothing(fetch, web, make_picture, body, coding, reason):
    web.reply("a.test", "/robots.txt", body, headers={"Content-Encoding": coding})
    web.reply("a.test", "/x", make_picture())
    (outcome,) = fetch("http://a.test/x", respect_robots=True)
    assert (outcome.reason, outcome.transient) == (reason, reason == "robots_unreachable")
    assert web.asked("/x") == (reason is None)


def test_the_authorities_asked_longest_ago_are_forgotten(monkeypatch):
    monkeypatch.setattr(robots, "_MAX_KNOWN", 3)
    monkeypatch.setattr(robots, "_KEEP_S", 0.0)  # all are asked for again
    known = {}

    async def get(url):
        return Reply(404, b"")

    async def run():
        asker = robots.Robots(get, known, AGENT)
        for name in "abcad":
            await asker.rules(f"http://{name}.test")

    asyncio.run(run())
    assert list(known) == ["http://c.test", "http://a.test", "http://d.test"]


def test_what_is_kept_is_bound_by_its_size(monkeypatch):
    """Ten small ones, of which a large one makes us forget the oldest; each that is forgotten gives its room back."""
    small = b"User-agent: *\nDisallow: /x\n"
    large = b"User-agent: *\n" + b"".join(b"Disallow: /%d\n" % n for n in range(5))
    monkeypatch.setattr(robots, "_MAX_KNOWN_BYTES", 10 * parse_reply(Reply(200, small), AGENT).num_bytes)
    known = {}

    async def run(*names):
        async def get(url):
            return Reply(200, large if "large" in url else small)

        asker = robots.Robots(get, known, AGENT)
        for name in names:
            await asker.rules(f"http://{name}.test")

    asyncio.run(run(*"abcdefghij"))
    assert len(known) == 10
    asyncio.run(run("large"))
    assert [place[7:].removesuffix(".test") for place in known] == [*"fghij", "large"]
    asyncio.run(run(*"klmnopqrst"))
    assert [place[7:].removesuffix(".test") for place in known] == [*"klmnopqrst"]


@pytest.mark.parametrize("name", ["*", "lvd-curate", "LVD-Curate/1.0"])
def test_crawl_delay(name):
    rules = parse_reply(
        Reply(200, f"User-agent: lvd\nCrawl-delay: 9\n\nUser-agent: {name}\nCrawl-delay: 2.5".encode()), AGENT
    )
    assert rules.delay_s() == 2.5
    assert parse_reply(Reply(404, b""), AGENT).delay_s() == 0


def test_denied_pages_are_not_asked_for_and_robots_once_a_host(fetch, web):
    web.reply("a.test", "/robots.txt", b"User-agent: *\nDisallow: /private/\n")
    outcomes = fetch(*(f"http://a.test/private/{n}.png" for n in range(5)), respect_robots=True)
    assert {(outcome.reason, outcome.robots) for outcome in outcomes} == {("robots_denied", "denied")}
    assert web.requests == [("a.test", "/robots.txt")]


def test_robots_that_cannot_be_had_deny_and_may_pass(fetch, web):
    web.reply("a.test", "/robots.txt", status=500)
    (outcome,) = fetch("http://a.test/a.png", respect_robots=True, attempts=2)
    assert (outcome.reason, outcome.transient, outcome.robots) == ("robots_unreachable", True, "unreachable")
    assert web.requests == [("a.test", "/robots.txt")] * 2


def test_robots_of_every_host_of_a_redirect(fetch, web):
    web.reply("a.test", "/go", status=301, headers={"Location": "http://b.test/private/x.png"})
    web.reply("b.test", "/robots.txt", b"User-agent: *\nDisallow: /private/\n")
    (outcome,) = fetch("http://a.test/go", respect_robots=True)
    assert (outcome.reason, outcome.robots) == ("robots_denied", "denied")
    assert ("b.test", "/private/x.png") not in web.requests


def test_robots_may_redirect_and_are_kept_between_loops(fetch, web, make_picture):
    web.reply("a.test", "/robots.txt", status=302, headers={"Location": "http://b.test/rules"})
    web.reply("b.test", "/rules", b"User-agent: *\nDisallow: /no\n")
    web.reply("a.test", "/yes.png", make_picture())
    rules = {}
    for _ in range(2):
        allowed, denied = fetch("http://a.test/yes.png", "http://a.test/no.png", respect_robots=True, rules=rules)
        assert (allowed.reason, denied.reason) == (None, "robots_denied")
    assert web.asked("/robots.txt") == 1
    assert web.asked("/rules") == 1
