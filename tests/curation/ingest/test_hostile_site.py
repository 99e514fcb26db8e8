"""Everything that a server may do wrong, at once, under a connector that records whoever else is contacted."""

import asyncio
import runpy
import time
from pathlib import Path

import pytest

from curation.ingest.fetch import FetchConfig
from curation.ingest.fetcher import Fetcher

HOSTILE = runpy.run_path(str(Path(__file__).parents[2] / "hostile_site.py"))
TIMEOUT_S = 5.0  # the site floods in the same process, on a machine that does other things too


@pytest.fixture(scope="module")
def site():
    site = HOSTILE["HostileSite"]().start()
    yield site
    site.stop()


@pytest.fixture
def ask(site, nameserver, contacts, tmp_path):
    """Fetches addresses at once; every name goes through a name server, and every contact is recorded."""
    recorder = type(contacts)(site.port)
    names = nameserver(site.names)
    names.turns[HOSTILE["REBINDS"]] = [["127.0.0.1"], ["169.254.169.254"], ["10.0.0.1"]]

    def ask_all(urls, **values):
        settings = {
            "resolve": site.resolve,
            "resolve_checked": True,
            "nameservers": [names.place],
            "per_host_interval_s": 0.0,
            "backoff_s": 0.02,
            "timeout_s": TIMEOUT_S,
            "concurrency": 24,
            "max_bytes": 4_000_000,
            **values,
        }

        async def run():
            async with Fetcher(FetchConfig(**settings), contact=recorder, scratch=tmp_path) as fetcher:
                return list(await asyncio.gather(*(fetcher.fetch(url) for url in urls)))

        outcomes = asyncio.run(run())
        assert recorder.refused == []
        assert names.alive
        return outcomes

    ask_all.names = names
    return ask_all


def test_every_row_ends_with_its_class_and_nobody_else_is_contacted(site, ask):
    rows = list(site.rows())
    started = time.monotonic()
    outcomes = ask([url for url, _ in rows])
    wrong = {
        url: (outcome.reason, ends)
        for (url, ends), outcome in zip(rows, outcomes, strict=True)
        if outcome.reason not in ends
    }
    assert wrong == {}, f"the name server was asked {len(ask.names.asked)} times"
    assert time.monotonic() - started < 8 * TIMEOUT_S
    assert not any(
        b"evil" in head.lower().split(b"\r\n", 1)[1] for head in site.heads
    )  # in no header but the first line
    assert all(outcome.body is None or outcome.reason is None for outcome in outcomes)


def test_every_forbidden_target_of_a_redirect_has_its_end():
    from collections import Counter

    assert HOSTILE["ENDS"].keys() == set(HOSTILE["FORBIDDEN"])
    ends = Counter(HOSTILE["ENDS"].values())
    assert ends == {"forbidden_address": 67, "bad_url": 6, "dns": 2, "http_4xx": 4}


def test_the_address_that_was_judged_is_the_one_that_is_asked(ask, site):
    """A name that leads elsewhere a moment later: it is looked up once."""
    outcomes = ask([f"http://{HOSTILE['REBINDS']}/{n}.png" for n in range(5)])
    assert [outcome.reason for outcome in outcomes] == [None] * 5
    assert ask.names.asked.count(HOSTILE["REBINDS"]) == 1


def test_no_body_is_taken_further_than_it_has_to_be(site, ask):
    names = [
        "gigabyte",
        "gigabyte-chunked",
        "gigabyte-of-text",
        "gzip-tail",
        "opt-out-flood",
        "huge-robots",
        "header-flood",
    ]
    site.sent.clear()
    ask([f"http://{site.host(name)}/0.png" for name in names])
    buffered = 8_000_000  # what may lie in buffers between here and there
    assert site.sent[site.host("gigabyte")] < buffered  # told by its length
    assert site.sent[site.host("gigabyte-chunked")] < 4_000_000 + buffered
    assert site.sent[site.host("gigabyte-of-text")] < buffered
    assert site.sent[site.host("gzip-tail")] < 4_000_000 + buffered
    assert site.sent[site.host("opt-out-flood")] < buffered
    assert site.sent[site.host("huge-robots")] < 500_000 + buffered
    assert site.sent[site.host("header-flood")] < 2 * buffered


def test_a_storm_of_refusals_is_not_answered_by_one_of_requests(site, ask):
    site.asked.clear()
    for name in ("storm", "storm-silent"):
        urls = [f"http://{site.host(name)}/{n}.png" for n in range(30)]
        assert {outcome.reason for outcome in ask(urls)} == {"rate_limited"}
    assert site.asked[site.host("storm")] <= 7
    assert site.asked[site.host("storm-silent")] <= 22


@pytest.mark.parametrize("target", [*HOSTILE["FORBIDDEN"], *(f"http://{name}:8080/" for name in HOSTILE["NAMES"])])
def test_no_forbidden_address_is_asked_for_directly(site, ask, target):
    (outcome,) = ask([target])
    no_name = ("dns",) if "localhost" in target.lower() else ()  # the name server does not know it
    assert outcome.reason in ("forbidden_address", "bad_url", *no_name)


@pytest.mark.parametrize(
    "url", ["http://a.test/\udcff\udcfe.png", "http://\udcff.test/x", "http://a.test/\x00", "http://a\r\nb/"]
)
def test_an_address_that_is_no_text_is_a_row(ask, url):
    assert ask([url])[0].reason in ("bad_url", "dns")


def test_a_url_cannot_smuggle_a_header(site, ask):
    site.heads.clear()
    host = site.host("plain")
    ask([f"http://{host}/a\r\nX-Evil: 1", f"http://{host}/a%0d%0aX-Evil:%201", f"http://{host}/a\nX-Evil: 1?b c"])
    for head in site.heads:
        assert b"x-evil" not in head.lower().split(b"\r\n", 1)[1]
        assert head.count(b"\r\n\r\n") == 1


def test_many_large_bodies_at_once_wait_on_disk(site, ask, tmp_path):
    """Of a body no more than a megabyte is held in memory while it comes."""
    import tracemalloc

    large = HOSTILE["picture"]() + b"\0" * 3_500_000
    site.cases["large"] = HOSTILE["Case"](ends=(None,), handler=HOSTILE["slow"](large))
    hosts = {f"large-{n}.hostile.test": site.cases["large"] for n in range(24)}
    site.cases.update({host.removesuffix(".hostile.test"): case for host, case in hosts.items()})
    ask.names.names.update(site.names)
    kept = []

    async def run():
        config = FetchConfig(resolve=site.resolve, timeout_s=20.0, respect_robots=False, per_host_interval_s=0.0)

        async with Fetcher(config, scratch=tmp_path) as fetcher:

            async def one(url):
                outcome = await fetcher.fetch(url)
                kept.append(len(outcome.body))

            await asyncio.gather(*(one(f"http://{host}/x") for host in hosts))

    tracemalloc.start()
    asyncio.run(run())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for host in hosts:
        del site.cases[host.removesuffix(".hostile.test")]
    assert kept == [len(large)] * 24
    assert peak_bytes < 24 * 1_300_000 + 3 * len(large)  # all of them are 84 MB
    assert list(tmp_path.iterdir()) == []
