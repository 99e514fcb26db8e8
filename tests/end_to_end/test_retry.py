import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.ingest.outcome import TRANSIENT
from pipelines.sample_web.serve import read_requests
from training.config import ConfigError

PASSING = ("http_5xx", "rate_limited", "truncated_body")


def images(folder):
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / "pool/images").glob("*.parquet"))])


def log(folder):
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / "pool/fetch_log").glob("*.parquet"))])


@pytest.fixture
def mended(lab, tmp_path):
    """The web after a while: servers that failed answer now."""
    web = tmp_path / "web"
    shutil.copytree(lab.web, web)
    site = json.loads((web / "site.json").read_text())
    for host in site.values():
        for answer in host["answers"].values():
            if answer.get("status") in (429, 500):
                del answer["status"]
                answer["file"] = "benchmark/00000.jpg"
            if answer.get("mode") == "truncate":
                del answer["mode"]
    (web / "site.json").write_text(json.dumps(site))
    return f"sample_web.path={web}"


def test_rows_that_may_pass_are_fetched_again_and_no_others(lab, undisturbed, mended, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "run")
    (folder / "pool/requests.jsonl").unlink()  # a link to the log of the undisturbed run
    before, visits = images(folder), log(folder)
    outcome = lab.curate(folder, mended, retry=["transient"], until="fetched")
    assert set(outcome.summary.costs) == {"fetch", "fetched"}
    after = images(folder)
    assert after["image_id"].equals(before["image_id"])
    passed = 0
    for old, new in zip(before.to_pylist(), after.to_pylist(), strict=True):
        if not old["transient"]:
            assert new == old  # the very bytes, where they lay
        passed += old["transient"] and new["ok"]
        assert new["ok"] or not old["transient"] or old["reason"] not in PASSING
    assert passed == sum(row["reason"] in PASSING for row in before.to_pylist()) >= 3
    assert outcome.summary.costs["fetch"].num_rows == sum(before["transient"].to_pylist())
    urls = {
        row["image_id"]: row["url"]
        for path in (folder / "pool/urls").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    retried = {urls[row["image_id"]] for row in before.to_pylist() if row["transient"]}
    asked = {f"http://{one['host']}{one['path']}" for one in read_requests(folder / "pool/requests.jsonl")}
    assert {url for url in asked if not url.endswith("/robots.txt")} <= retried
    told = [visit for visit in log(folder).to_pylist() if visit in visits.to_pylist()]
    assert len(told) == visits.num_rows  # visits of before are still known
    assert log(folder).num_rows > visits.num_rows


def test_a_retry_equals_a_run_that_had_no_failures(lab, undisturbed, mended, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "run")
    lab.curate(folder, mended, retry=PASSING, until="fetched")
    scratch = tmp_path / "scratch"
    lab.curate(scratch, mended, until="fetched")
    assert [row["sha256"] for row in images(folder).to_pylist()] == [
        row["sha256"] for row in images(scratch).to_pylist()
    ]
    for path in sorted((scratch / "run/fetched").glob("*.parquet")):
        assert pq.read_table(path).equals(pq.read_table(folder / "run/fetched" / path.name))


def test_a_retry_that_changes_nothing_leaves_all_else_done(lab, undisturbed, tmp_path):
    folder = lab.copy(undisturbed, tmp_path / "run")
    (folder / "pool/requests.jsonl").unlink()
    outcome = lab.curate(folder, retry=["http_5xx"])
    assert set(outcome.summary.costs) == {"fetch"}
    assert lab.contents(folder) == lab.contents(undisturbed)
    assert images(folder).equals(images(undisturbed))
    assert lab.curate(folder).summary.num_jobs == 0
    assert lab.curate(folder, retry=["crawl_delay"]).summary.num_jobs == 0


def test_a_class_that_is_none_is_named(lab, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--retry 'gone' is no failure class; give transient \(dns, connection, bad_certificate,"
    ):
        lab.curate(tmp_path, retry=["gone"])


def test_what_may_pass_is_what_the_rows_say(undisturbed):
    for row in images(undisturbed).to_pylist():
        assert row["transient"] == (row["reason"] in TRANSIENT)
