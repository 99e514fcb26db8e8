"""The front page of the sample web as the one source: the same pictures as by its list, down to tars."""

import json

import pandas as pd
import pytest

from curation.ingest.address import canonical_url
from pipelines.preflight import Options
from pipelines.results import opened, verify_run
from pipelines.sample_web.serve import read_requests
from pipelines.sample_web.truth import NEVER_READ, NEVER_REQUESTED, read_truth
from pipelines.session import curate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FRONT_PAGE = "http://h000.sample.test/"
SOURCE = ("sources.web.kind=pages", f"sources.web.location={FRONT_PAGE}", "sources.web.depth=1")
FEW = (*SOURCE, "sources.web.max_pages=60")


def fetched(folder):
    """sha256 and reason of each address that was let through, in its one spelling."""
    with opened(f"{folder}/run") as database:
        rows = database.connection.execute(
            "SELECT url, i.sha256, i.reason FROM urls JOIN images i USING (image_id) WHERE source = 'web'"
        ).fetchall()
    return {canonical_url(url): (sha256, reason) for url, sha256, reason in rows}


@pytest.fixture(scope="module")
def crawled(lab, tmp_path_factory):
    """Pool and run of a crawl of some pages, down to tars."""
    folder, said = tmp_path_factory.mktemp("crawled"), []
    curate(lab.recipe(folder, *FEW), Options(dry_run=True), said.append)
    assert any("a dry run asks for none" in line for line in said)
    assert not list((folder / "pool").glob("pages/*"))
    lab.curate(folder, *FEW)
    return folder


def test_a_crawl_finds_what_the_truth_says_stands_on_pages_that_may_be_read(lab, tmp_path):
    said = []
    curate(lab.recipe(tmp_path, *SOURCE), Options(until="screened"), said.append)
    site = json.loads((lab.web / "site.json").read_text())
    closed = {host for host, spec in site.items() if spec["robots_status"] == 503 or "Disallow: /\n" in spec["robots"]}
    expected = {canonical_url(url) for host in set(site) - closed for url, _ in site[host]["page"]}
    with opened(f"{tmp_path}/run") as database:
        rows = database.connection.execute("SELECT url, error, page_url FROM urls WHERE source = 'web'").fetchall()
        ends = database.connection.execute(
            "SELECT coalesce(reason, 'read'), count(*) FROM pages GROUP BY ALL"
        ).fetchall()
    found = {canonical_url(url) for url, error, _ in rows if error is None}
    assert found == expected
    assert found <= {
        canonical_url(row["url"]) for row in read_truth(lab.web).to_pylist() if row["kind"] != "broken_line"
    }
    assert len(found) > 150
    assert dict(ends) == {"read": len(site) - len(closed), "robots_denied": 3, "robots_unreachable": 1}
    assert {page for _, error, page in rows if error is not None} == {f"http://{host}/" for host in closed}
    assert any(line.startswith("crawl 'web': 200 pages") and "not read: 3 robots_denied, 1" in line for line in said)


def test_the_same_pictures_by_each_route_are_the_same_bytes(undisturbed, crawled):
    by_list, by_crawl = fetched(undisturbed), fetched(crawled)
    assert sum(sha256 is not None for sha256, _ in by_crawl.values()) > 40
    assert {url: by_list[url] for url in by_crawl} == by_crawl


def test_a_crawl_reaches_tars(crawled):
    manifest = pd.read_parquet(crawled / "run" / "manifest")
    problems, num_samples = verify_run(f"{crawled}/run")
    assert (problems, num_samples) == ([], len(manifest))
    web = manifest[manifest.source == "web"]
    assert len(web) > 10
    assert web.page_url.str.match(r"http://h\d{3}\.sample\.test/$").all()


def test_nobody_is_asked_who_must_not_be(lab, crawled):
    truth = read_truth(lab.web).to_pylist()
    requests = read_requests(crawled / "pool" / "requests.jsonl")
    never, unread = ({row["url"] for row in truth if row["kind"] in kinds} for kinds in (NEVER_REQUESTED, NEVER_READ))
    assert not never & {f"http://{one['host']}{one['path']}" for one in requests}
    assert not unread & {f"http://{one['host']}{one['path']}" for one in requests if one["complete"]}
    pages = [one["host"] for one in requests if one["path"] == "/"]
    assert (len(pages), len(set(pages))) == (60, 60)


def test_the_same_command_crawls_nothing(lab, crawled):
    before, num_requests = lab.digests(crawled), len(read_requests(crawled / "pool" / "requests.jsonl"))
    assert lab.curate(crawled, *FEW).summary.num_jobs == 0
    assert lab.digests(crawled) == before
    assert len(read_requests(crawled / "pool" / "requests.jsonl")) == num_requests
