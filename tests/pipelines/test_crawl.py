"""A crawl as parts of a pool: killed, extended, retried, and registered in an order that never changes."""

import hashlib
import http.client
import json
import time
from contextlib import ExitStack
from uuid import uuid4

import pyarrow.parquet as pq
import pytest

from curation.ingest import crawl as crawling
from curation.ingest.crawl import Crawler
from curation.ingest.fetch import FetchConfig
from curation.ingest.register import register
from curation.ingest.screen import ScreenConfig
from curation.ingest.sources import SourceConfig, check_source
from curation.schema import TABLES
from curation.store import LocalStore
from pipelines.crawl import crawl_pages, crawled_lines, crawls_to_do, refusing
from pipelines.runner import StageFailedError
from pipelines.sample_web.serve import serving
from training.config import ConfigError

NUM_PAGES = 14


def page_text(n):
    """Page N shows two pictures and leads to two later pages, and back to the first."""
    links = "".join(f"<a href=/{m}>{m}</a>" for m in (2 * n + 1, 2 * n + 2, 0) if m < NUM_PAGES)
    return f"<img src=/{n}/a.jpg alt=a{n}><img src=/{n}/b.jpg>{links}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    answers = {f"/{n}": {"text": page_text(n), "type": "text/html"} for n in range(NUM_PAGES)}
    answers["/5"] = {"status": 503, "text": "", "type": "text/html"}
    hosts = {"a.test": {"robots": "", "robots_status": 200, "page": [], "answers": answers}}
    folder = tmp_path_factory.mktemp("site")
    (folder / "site.json").write_text(json.dumps(hosts))
    return folder


@pytest.fixture(scope="module")
def site(folder):
    with serving(folder) as running:
        yield running


class Killed(Exception):
    pass


def paths_of(pages):
    return {row["url"].removeprefix("http://a.test") for row in pages}


class Lab:
    """Crawls into a pool of its own."""

    def __init__(self, tmp_path, site):
        self.path, self.site = tmp_path, site
        self.pool = LocalStore(str(tmp_path / "pool"))
        self.said = []
        self.scratch = tmp_path / "scratch"
        self.scratch.mkdir(parents=True)

    def source(self, *pages, **values):
        path = self.path / "pages.txt"
        path.write_text("".join(f"http://a.test/{page}\n" for page in pages))
        return SourceConfig(location=str(path), kind="pages", **values)

    def crawl(self, config, *, parts=None, retry=(), screen=None, by=lambda: None, **fetching):
        """Whether there was something to do; it is killed after a number of parts. ``by`` is called at each."""
        num_commits = 0

        def check():
            nonlocal num_commits
            num_commits += 1
            by()
            if parts is not None and num_commits > parts:
                raise Killed

        fetch = FetchConfig(resolve=self.site.resolve, per_host_interval_s=0, backoff_s=0.01, per_host=8, **fetching)
        crawls = crawls_to_do([("web", "pool", config)], self.pool, frozenset(retry))
        for crawl in crawls:
            crawl_pages(
                crawl,
                self.pool,
                Crawler(fetch),
                refuses=refusing(screen or ScreenConfig()),
                retried=frozenset(retry),
                scratch=self.scratch,
                check=check,
                say=self.said.append,
            )
        return bool(crawls)

    def parts(self):
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(self.pool.path.glob("pages/*"))
        }

    def rows(self):
        return [line.row for line in crawled_lines(self.pool, "web")]

    def pages(self):
        tables = [pq.read_table(path) for path in sorted(self.pool.path.glob("pages/*"))]
        return [row for table in tables for row in table.to_pylist()]

    def asked(self):
        """Pages that the server was asked for until now."""
        mark = f"/mark/{uuid4().hex}"  # the server notes a visit when it is over: where this one is noted, all are
        connection = http.client.HTTPConnection("127.0.0.1", self.site.port)
        connection.request("GET", mark, headers={"Host": "a.test"})
        connection.getresponse().read()
        connection.close()
        deadline = time.monotonic() + 30
        while mark not in (paths := [one["path"] for one in self.site.requests()]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return [path for path in paths if path != "/robots.txt" and not path.startswith("/mark/")]


@pytest.fixture
def lab(tmp_path, site, monkeypatch):
    monkeypatch.setattr(crawling, "PAGES_IN_PART", 3)
    return Lab(tmp_path, site)


def test_a_crawl_is_written_once_and_registered_in_order(lab):
    config = lab.source(0, depth=9)
    assert lab.crawl(config)
    pages = lab.pages()
    assert pq.read_table(next(lab.pool.path.glob("pages/*"))).schema.equals(TABLES["pages"].schema)
    assert [int(row["url"].rpartition("/")[2]) for row in pages] == [n for n in range(NUM_PAGES) if n not in (11, 12)]
    assert [row["page"] for row in pages] == list(range(NUM_PAGES - 2))
    assert [row["reason"] for row in pages if row["reason"]] == ["http_5xx"]
    assert [row.url for row in lab.rows()][:4] == [f"http://a.test/{n}/{x}.jpg" for n in (0, 1) for x in "ab"]
    assert [row.error for row in lab.rows() if row.error] == ["page not read: http_5xx"]
    assert lab.said == ["crawl 'web': 12 pages visited, 22 pictures on them; not read: 1 http_5xx"]
    before, asked = lab.parts(), lab.asked()
    assert not lab.crawl(config)
    assert (lab.parts(), lab.asked()) == (before, asked)
    shards = {}
    sources = register(
        [("web", "pool", config)],
        None,
        shard_rows=10,
        write=shards.__setitem__,
        crawled=lambda name: crawled_lines(lab.pool, name),
        stamps={},
    )
    assert sources.to_pylist()[0]["num_rows"] == 23
    assert [row["file_line"] for row in shards[0].to_pylist()][:3] == [1, 2, 1]
    assert {row["file"] for row in shards[0].to_pylist()[:2]} == {"http://a.test/0"}


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_a_crawl_that_was_killed_goes_on_and_ends_the_same(lab, site, tmp_path, parts):
    other = Lab(tmp_path / "other", site)
    other.crawl(other.source(0, 13, depth=9))
    with pytest.raises(Killed):
        lab.crawl(lab.source(0, 13, depth=9), parts=parts)
    assert len(lab.parts()) == parts
    committed, num_asked = paths_of(lab.pages()), len(lab.asked())
    assert lab.crawl(lab.source(0, 13, depth=9))
    assert lab.parts() == other.parts()
    assert lab.rows() == other.rows()
    assert not committed & set(lab.asked()[num_asked:])


def test_a_crawl_whose_site_dies_stops_with_one_line_and_goes_on(lab, folder, site, tmp_path):
    """None of its pages stands as failed, and a command that finds the site dead from its start adds none."""
    other = Lab(tmp_path / "other", site)
    other.crawl(other.source(0, 13, depth=9))
    with ExitStack() as running:
        lab.site = running.enter_context(serving(folder, log=tmp_path / "requests.jsonl"))
        with pytest.raises(StageFailedError) as caught:
            lab.crawl(
                lab.source(0, 13, depth=9),
                by=lambda: running.close() if len(lab.parts()) == 1 else None,
                breaker_patience_s=0.0,
            )
    assert str(caught.value) == (
        "crawl of sources.web: 1 of the last 1 hosts failed (1 connection) and hosts reached before cannot be reached "
        "now (a.test); check the name server and the network: nothing of this shard was recorded; where they are gone "
        "for good, fetch.breaker=false records that"
    )
    parts = lab.parts()
    assert len(parts) == 2
    with pytest.raises(StageFailedError, match=r"\(1 connection\) and no host was reached in between; check"):
        lab.crawl(lab.source(0, 13, depth=9))
    assert lab.parts() == parts
    lab.site = site
    assert lab.crawl(lab.source(0, 13, depth=9))
    assert lab.parts() == other.parts()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"depth": 1}, {"depth": 9}),
        ({"depth": 9, "max_pages": 4}, {"depth": 9, "max_pages": 9}),
        ({"depth": 9, "max_pages_per_host": 4}, {"depth": 9, "max_pages_per_host": 9}),
    ],
)
def test_wider_limits_extend_at_the_end(lab, before, after):
    lab.crawl(lab.source(0, **before))
    parts, rows = lab.parts(), lab.rows()
    committed, num_asked = paths_of(lab.pages()), len(lab.asked())
    assert lab.crawl(lab.source(0, **after))
    assert len(lab.rows()) > len(rows)
    assert lab.rows()[: len(rows)] == rows
    assert parts.items() <= lab.parts().items()
    assert not committed & set(lab.asked()[num_asked:])
    assert not lab.crawl(lab.source(0, **after))


def test_a_longer_list_extends_and_a_changed_one_is_an_error(lab):
    lab.crawl(lab.source(3, 4, depth=0))
    rows = lab.rows()
    lab.crawl(lab.source(3, 4, 1, depth=0))
    assert lab.rows()[: len(rows)] == rows
    assert [row.url for row in lab.rows()[len(rows) :]] == ["http://a.test/1/a.jpg", "http://a.test/1/b.jpg"]
    asked = lab.asked()
    with pytest.raises(
        ConfigError,
        match=r"sources\.web: source 'web' changed instead of being extended: its first 3 pages are not those that "
        "were crawled; use a new name or a new pool",
    ):
        lab.crawl(lab.source(3, 5, 1, depth=0))
    with pytest.raises(ConfigError, match=r"changed instead of being extended: it names 1 pages and named 3"):
        lab.crawl(lab.source(3, depth=0))
    assert lab.asked() == asked


def test_more_depth_that_leads_nowhere_is_remembered(lab):
    lab.crawl(lab.source(13, depth=5))
    before = len(lab.parts())
    assert lab.crawl(lab.source(13, depth=900))
    assert len(lab.parts()) == before + 1
    assert not lab.crawl(lab.source(13, depth=900))


def test_failed_pages_are_visited_again_when_asked(lab):
    lab.crawl(lab.source(0, depth=9))
    before, rows = lab.parts(), lab.rows()
    assert lab.crawl(lab.source(0, depth=9), retry=["http_5xx"])
    assert lab.pages()[-1]["reason"] == "http_5xx"
    assert lab.pages()[-1]["page"] == len(lab.pages()) - 1
    assert before.items() <= lab.parts().items()
    assert lab.rows() == rows  # it failed again: nothing new
    assert not lab.crawl(lab.source(0, depth=9), retry=["dns"])


def test_a_page_that_answers_when_it_is_asked_again_adds_its_pictures_at_the_end(lab, tmp_path):
    lab.crawl(lab.source(0, depth=9))
    rows = lab.rows()
    mended = tmp_path / "mended"
    mended.mkdir()
    hosts = json.loads((lab.site.folder / "site.json").read_text())
    hosts["a.test"]["answers"]["/5"] = {"text": page_text(5), "type": "text/html"}
    (mended / "site.json").write_text(json.dumps(hosts))
    with serving(mended) as lab.site:
        lab.crawl(lab.source(0, depth=9), retry=["http_5xx"])
    assert [row.url for row in lab.rows()[len(rows) :]] == [
        f"http://a.test/{n}/{x}.jpg" for n in (5, 11, 12) for x in "ab"
    ]
    assert lab.rows()[: len(rows)] == rows


def test_blocked_pages_are_rows_and_never_asked_for(lab):
    num_asked = len(lab.asked())
    lab.crawl(lab.source(0, depth=1), screen=ScreenConfig(blocked_urls=["a.test/1"]))
    assert [(row["url"], row["reason"]) for row in lab.pages()][1] == ("http://a.test/1", "blocked_url")
    assert lab.asked()[num_asked:] == ["/0", "/2"]


def test_limits_that_cut_are_told(lab):
    lab.crawl(lab.source(0, 1, 2, depth=2, max_pages=2))
    assert lab.said[1] == "  1 pages of the list and further links were left out: max_pages is 2"
    other = Lab(lab.path / "other", lab.site)
    other.crawl(other.source(0, depth=2, max_pages_per_host=2))
    assert other.said[1] == "  links of 1 hosts (a.test, …) were left out: max_pages_per_host is 2"


def test_two_sources_keep_apart(lab):
    lab.crawl(lab.source(0, depth=1))
    rows = lab.rows()
    crawls = crawls_to_do([("more", "query", lab.source(6))], lab.pool, frozenset())
    assert [crawl.parts for crawl in crawls] == [[]]
    crawl_pages(
        crawls[0],
        lab.pool,
        Crawler(FetchConfig(resolve=lab.site.resolve, per_host_interval_s=0)),
        refuses=refusing(ScreenConfig()),
        retried=frozenset(),
        scratch=lab.scratch,
        check=lambda: None,
        say=lab.said.append,
    )
    assert lab.rows() == rows
    assert {row["source"] for row in lab.pages()} == {"web", "more"}
    assert [line.row.alt_text for line in crawled_lines(lab.pool, "more")] == ["a6", None]


def test_one_page_is_a_source(lab):
    config = SourceConfig(location="http://a.test/3", kind="pages")
    check_source("sources.web", config)
    lab.crawl(config)
    assert [row.url for row in lab.rows()] == ["http://a.test/3/a.jpg", "http://a.test/3/b.jpg"]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://", r"sources\.web\.location: 'http://' is the address of no page: no host"),
        ("nowhere.txt", r"sources\.web\.location: 'nowhere\.txt' does not exist"),
        ("ftp://a.test/x", r"sources\.web\.location: 'ftp://a.test/x': scheme 'ftp' is not known"),
    ],
)
def test_a_place_that_names_no_page_is_an_error(location, message):
    with pytest.raises(ConfigError, match=message):
        check_source("sources.web", SourceConfig(location=location, kind="pages"))
