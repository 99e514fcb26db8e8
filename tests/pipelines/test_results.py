import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.export.export import ExportConfig
from curation.lease import Lease
from pipelines.results import clean, opened, score_run, status, verify_run, write_card, write_page
from pipelines.sample_web.truth import TRUTH_SCHEMA
from training.config import ConfigError


@pytest.fixture
def run(small_run: Any) -> str:
    small_run.export(ExportConfig(samples_per_tar=4))
    return str(small_run.run)


@pytest.mark.parametrize("look", [status, verify_run, write_page, write_card, clean])
def test_without_a_run_all_say_what_to_do(tmp_path: Path, look: Any):
    arguments = (False,) if look is status else ()
    with pytest.raises(ConfigError, match=r"no run at .*; make one with lvd curate smoke"):
        look(str(tmp_path / "none"), *arguments)


def test_opened_run_has_its_tables(run: str, small_run: Any):
    with opened(run) as database:
        assert database.connection.execute("SELECT count(*) FROM manifest").fetchone() == (6,)
        assert (database.truth, database.pool, database.run) == (None, str(small_run.pool), run)
        with pytest.raises(ConfigError, match="was not made from a sample web"):
            score_run(database)
        with pytest.raises(ConfigError, match="is not there"):
            score_run(database, small_run.pool / "truth.parquet")


def test_score_holds_the_pool_against_the_truth(run: str, tmp_path: Path):
    ends = ["kept", "screened", "fetched", "safety", "near|duplicates", "duplicates",
            "kept", "leakage", "kept", "kept", "screened", "kept"]  # fmt: skip
    reasons = [None, "blocked_host", "http_4xx", "too_small", "near_duplicate|copy", "copy",
               None, "leak", None, None, "duplicate_url", None]  # fmt: skip
    rows = [
        {"line": n, "url": f"u{n}", "kind": "base" if end == "kept" else f"kind{n}", "end_stage": end, "reason": reason}
        for n, (end, reason) in enumerate(zip(ends, reasons, strict=True))
    ]
    (tmp_path / "web").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA), tmp_path / "web" / "truth.parquet")
    with opened(run) as database:
        score = score_run(database, tmp_path / "web" / "truth.parquet")
    assert (score.num_lines, score.overall, score.contacts, score.failures()) == (12, 1.0, None, [])


def test_forbidden_contacts_are_read_from_the_log_in_the_pool(run: str, small_run: Any, tmp_path: Path):
    row = {"line": 0, "url": "http://h0.test/x.jpg", "kind": "robots_denied", "end_stage": "kept"}
    kept = {"line": 11, "url": "u", "kind": "base", "end_stage": "kept"}
    pq.write_table(pa.Table.from_pylist([row, kept], schema=TRUTH_SCHEMA), tmp_path / "truth.parquet")
    request = {"host": "h0.test", "path": "/x.jpg", "method": "GET", "status": 200, "complete": True, "bytes": 1}
    (small_run.pool / "requests.jsonl").write_text(json.dumps(request) + "\n")
    with opened(run) as database:
        assert score_run(database, tmp_path / "truth.parquet").contacts == ("asked for http://h0.test/x.jpg",)


def test_a_limited_run_is_seen_as_far_as_it_goes(run: str, small_run: Any):
    (small_run.run / "recipe.yaml").write_text("execution: {max_shards: 1}\n")
    with opened(run) as database:
        lines = database.connection.execute("SELECT count(*) FROM end_state WHERE role = 'pool'").fetchone()
    assert lines == (6,)
    tables = {table["table"]: table for table in json.loads(status(run, as_json=True))["tables"]}
    assert (tables["screened"]["num_parts"], tables["screened"]["num_shards"]) == (4, 4)


def test_status(run: str, small_run: Any, tmp_path: Path):
    told = json.loads(status(run, as_json=True))
    tables = {table["table"]: table for table in told["tables"]}
    assert (tables["urls"]["num_parts"], tables["urls"]["num_shards"], tables["urls"]["num_rows"]) == (5, 5, 19)
    assert (tables["near"]["num_parts"], tables["near"]["num_shards"]) == (2, 2)
    assert (tables["descriptors"]["num_parts"], tables["descriptors"]["num_shards"]) == (0, 5)
    assert (tables["embeddings"]["num_parts"], tables["embeddings"]["num_shards"]) == (0, 4)
    assert (tables["manifest"]["num_parts"], tables["manifest"]["num_rows"]) == (2, 6)
    assert "nobody" in status(run, as_json=False)
    lease = Lease(small_run.store("run"), tmp_path)
    try:
        assert "process" in status(run, as_json=False)
    finally:
        lease.release()


def test_verify_and_page(run: str, small_run: Any):
    assert verify_run(run) == ([], 6)
    assert write_page(run) == small_run.run / "report.html"
    (small_run.run / "shards/part-000000000.parquet").unlink()
    with pytest.raises(ConfigError, match="has no tars yet"):
        verify_run(run)


def test_clean_removes_what_nobody_names_and_nothing_else(run: str, small_run: Any):
    assert clean(run) == {"objects": 4, "bytes": 4 * 10_240}  # empty tars: four shards without a face
    stray = [small_run.pool / "bytes/x.tar", small_run.pool / "small/x.tar", small_run.run / "tars/x.tar"]
    for path in stray:
        path.write_bytes(b"12345")
    assert clean(run) == {"objects": 3, "bytes": 15}
    assert not any(path.exists() for path in stray)
    assert verify_run(run) == ([], 6)


def test_clean_waits_for_a_living_driver(run: str, small_run: Any, tmp_path: Path):
    lease = Lease(small_run.store("pool"), tmp_path)
    try:
        with pytest.raises(ConfigError, match="works on it"):
            clean(run)
    finally:
        lease.release()
