from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from curation.export.export import ExportConfig
from curation.query import VIEWS, connect, names_of, run_checks, run_sql
from curation.schema import TABLES
from training.config import ConfigError

WEB, FIRST, SECOND = 3_000_000, 3_000_000_000_000, 3_000_001_000_000


@pytest.fixture
def exported(small_run: Any) -> Any:
    small_run.export(ExportConfig(samples_per_tar=4))
    return small_run


def test_every_line_has_one_end_state(exported: Any):
    frame = run_sql(exported.connect(), "end_state")
    ends = {row.image_id: (row.role, row.stage, row.reason) for row in frame.itertuples()}
    assert len(frame) == len(ends) == 19
    assert [ends[FIRST + n][1:] for n in range(1, 6)] == [
        ("screened", "blocked_host"),
        ("fetched", "http_4xx"),
        ("safety", "too_small"),
        ("near", "near_duplicate"),
        ("duplicates", "copy"),
    ]
    assert ends[FIRST][:2] == ("pool", "kept")
    assert ends[SECOND + 1][1:] == ("leakage", "leak")
    assert ends[SECOND + 2][1:] == ("selection", "not_retrieved")
    assert ends[0][:2] == ("benchmark", "reference")
    assert ends[1_000_000_000_000][:2] == ("query", "kept")
    assert ends[1_000_000_000_002] == ("query", "safety", "decode_corrupt")
    assert ends[2_000_000_000_000][:2] == ("query", "reference")
    assert ends[2_000_000_000_001] == ("query", "fetched", "file_missing")
    copy = frame[frame.image_id == FIRST + 5].iloc[0]
    assert (copy.score, copy.threshold) == (pytest.approx(0.7), pytest.approx(0.6))


def test_a_run_that_is_not_through_has_pending_lines(small_run: Any):
    (small_run.run / f"selection/part-{WEB:09d}.parquet").unlink()
    (small_run.run / f"leakage/part-{WEB:09d}.parquet").unlink()
    connection = small_run.connect()
    frame = run_sql(connection, "end_state")
    assert len(frame) == 19
    assert list(frame[frame.stage == "pending"].image_id) == [FIRST]
    assert run_checks(connection)["no_pending"] == 1


@pytest.mark.parametrize("old", [0, 1])
def test_a_pool_whose_first_rows_do_not_tell_their_file(small_run: Any, old: int):
    parts = [small_run.pool / f"urls/part-{shard:09d}.parquet" for shard in (WEB, WEB + 1)]
    pq.write_table(pq.read_table(parts[old]).drop_columns(["file", "file_line"]), parts[old])
    told = small_run.connect().execute("SELECT image_id, file, file_line FROM urls ORDER BY image_id").df()
    assert len(told) == 19
    assert told.file.isna().all()


def test_reports(exported: Any):
    connection = exported.connect()
    funnel = run_sql(connection, "funnel").set_index("stage")
    assert list(funnel.num_in) == [12, 10, 9, 8, 7, 6, 5, 5]
    assert list(funnel.num_left) == [10, 9, 8, 7, 6, 5, 5, 4]
    assert funnel.share["selection"] == pytest.approx(4 / 12)
    reasons = run_sql(connection, "reasons")
    assert reasons.num_lines.sum() == 12
    hosts = run_sql(connection, "hosts").set_index("host")
    assert (hosts.num_lines.sum(), hosts.num_kept.sum(), hosts.num_fetched.sum()) == (12, 4, 9)
    clusters = run_sql(connection, "clusters")
    assert (clusters.num_pool.sum(), clusters.num_queries.sum(), clusters.num_chosen.sum()) == (5, 3, 4)
    composition = run_sql(connection, "composition").set_index("part")
    assert dict(composition.num_pictures) == {"dogs": 4, "flowers": 2}
    assert dict(composition.num_blurred) == {"dogs": 1, "flowers": 0}
    assert composition.share.sum() == pytest.approx(1)
    query_sets = run_sql(connection, "query_sets").set_index("query_set")
    assert list(query_sets.index) == ["flowers", "dogs"]
    counts = ["num_images", "num_queries", "num_final_nominal", "num_final"]
    assert query_sets[counts].to_numpy().tolist() == [[3, 2, 2, 2], [2, 1, 4, 4]]
    assert query_sets.loc["dogs", ["num_nominal", "num_retrieved", "num_unique", "recall"]].tolist() == [4, 4, 4, 1.0]
    assert len(run_sql(connection, "shortfall")) == 0


def test_reports_of_components(small_run: Any):
    connection = small_run.connect()
    sizes = run_sql(connection, "component_sizes")
    assert sizes.to_dict("list") == {
        "size": [1, 2],
        "num_components": [5, 1],
        "num_pictures": [5, 2],
        "share": [5 / 7, 2 / 7],
    }
    sweep = run_sql(connection, "component_sweep")
    assert sweep.threshold.tolist() == pytest.approx([0.55, 0.6, 0.8, 1.0])
    assert list(sweep.share_dropped) == [2 / 7, 1 / 7, 0, 0]
    assert list(sweep.share_largest) == [3 / 7, 2 / 7, 1 / 7, 1 / 7]
    assert sweep.threshold[sweep.in_use].tolist() == pytest.approx([0.6])
    (small_run.run / "component_sizes" / "part-000000000.parquet").unlink()
    assert list(run_sql(small_run.connect(), "component_sweep").share_dropped) == [0] * 4


def test_report_of_the_search(small_run: Any):
    found = run_sql(small_run.connect(), "edge_recall")
    assert found.kind.tolist() == ["pool", "benchmark"]
    assert found.num_found.tolist() == [3, 0]
    assert found.recall.isna().tolist() == [False, True]
    (small_run.run / "edge_recall" / "part-000000000.parquet").unlink()
    assert len(run_sql(small_run.connect(), "edge_recall")) == 0


def test_reports_of_leakage(small_run: Any):
    small_run.match_a_test_picture()
    connection = small_run.connect()
    (row,) = run_sql(connection, "leakage").to_dict("records")
    assert row == {
        "benchmark": "bench", "num_images": 2, "num_matched": 2, "share": 1.0, "num_dropped": 2, "num_direct": 1,
        "num_through": 0, "num_as_is": 1, "max_similarity": 0.875, "median_similarity": pytest.approx(0.7875),
    }  # fmt: skip
    leaks = run_sql(connection, "leaks")
    assert leaks.reason.tolist() == ["test_match", "leak"]
    assert leaks.address[0] == "http://h0.test/flowers/1000000000000.jpg"
    assert leaks.reference.tolist() == ["http://h0.test/bench/0.jpg", "http://h1.test/bench/1.jpg"]
    assert leaks.via_id.isna().all()
    assert run_checks(connection) == {}
    end = connection.execute("SELECT stage, reason FROM end_state WHERE image_id = 1000000000000").fetchone()
    assert end == ("selection", "test_match")
    steps = "SELECT reason, num_rows FROM funnel_steps WHERE role = 'as_is' ORDER BY ALL"
    assert connection.execute(steps).fetchall() == [("test_match", 1), (None, 1)]


def test_semantic_duplicates_pass_the_checks(small_run: Any):
    small_run.mean_the_same()
    connection = small_run.connect()
    assert set(run_checks(connection)) <= {"choices_match_retrieval"}  # the set was not asked again
    ends = connection.execute("SELECT count(*) FROM end_state WHERE reason = 'semantic_duplicate'").fetchone()
    assert ends == (2,)
    small_run.change("semantic", 3_000_001, 0, keep=False, reason="semantic_duplicate")
    assert "representative_is_kept" in run_checks(small_run.connect())


def test_a_good_run_passes_all_checks(exported: Any):
    assert len(names_of("checks")) >= 9
    assert run_checks(exported.connect()) == {}


def test_checks_of_a_run_without_tars(small_run: Any):
    assert run_checks(small_run.connect()) == {}


CHANGES = {
    "unique_ids": lambda run: run.write("near", WEB, [*run.read("near", WEB), run.read("near", WEB)[-1]]),
    "verdict_covers_previous": lambda run: run.write("near", WEB, run.read("near", WEB)[:-1]),
    "no_pending": lambda run: run.write("selection", WEB, []),
    "manifest_matches_selection": lambda run: run.change("manifest", 0, 1, part="cats"),
    "choices_match_selection": lambda run: run.change("choices", WEB, 0, copy=1),
    "choices_match_retrieval": lambda run: run.change("choices", WEB, 0, part="flowers"),
    "manifest_unique": lambda run: run.change("manifest", 0, 1, key="000000000"),
    "representative_is_kept": lambda run: run.change("near", WEB, 1, representative_id=FIRST + 3),
    "blurred_used": lambda run: run.write(
        "manifest", 0, [{**row, "blurred": not row["blurred"]} for row in run.read("manifest", 0)]
    ),
    "ids_in_shard": lambda run: run.change("urls", WEB, 5, image_id=FIRST + 1_000_000 + 77),
    "conservation": lambda run: run.write("sources", 0, run.read("sources", 0)[:3]),
}


def test_every_view_is_loaded():
    assert set(VIEWS) == set(names_of("views"))


def test_every_check_has_a_case_that_breaks_it():
    assert set(CHANGES) == set(names_of("checks"))


@pytest.mark.parametrize("name", CHANGES)
def test_a_check_finds_what_it_is_for(exported: Any, name: str):
    CHANGES[name](exported)
    assert name in run_checks(exported.connect())


def block(run: Any) -> None:
    """What stands for a group is dropped for a blocked hash."""
    run.change("near", WEB, 0, keep=False, reason="blocked_hash")


def empty_the_plan(run: Any) -> None:
    """The plan holds nothing, and so does the manifest."""
    for name, num_parts in (("export_rows", 1), ("export_plan", 1), ("manifest", 2), ("tar_digests", 1), ("shards", 1)):
        for part in range(num_parts):
            run.write(name, part, [])


FURTHER = [
    ("representative_is_kept", block, [FIRST + 4]),
    ("representative_is_kept", lambda run: run.change("duplicates", WEB, 0, representative_id=SECOND), [FIRST]),
    ("representative_is_kept", lambda run: run.change("duplicates", WEB, 0, representative_id=None), [FIRST]),
    ("manifest_matches_selection", empty_the_plan, None),
    ("manifest_matches_selection", lambda run: run.take_twice(in_manifest=False), [SECOND]),
    ("choices_match_selection", lambda run: run.change("choices", WEB, 0, query_id=7), [FIRST]),
]


@pytest.mark.parametrize(("name", "change", "found"), FURTHER)
def test_a_check_finds_what_is_less_plain(exported: Any, name: str, change: Any, found: list[int] | None):
    change(exported)
    frame = run_sql(exported.connect(), name)
    if found is None:
        kept = exported.connect().execute("SELECT image_id FROM selection WHERE keep").fetchall()
        found = sorted(image_id for (image_id,) in kept)
        assert len(found) == 6
    assert list(frame.image_id) == found


def test_a_multiset_passes_all_checks_and_a_missing_sample_is_found(exported: Any):
    exported.take_twice()
    connection = exported.connect()
    assert run_checks(connection) == {}
    composition = run_sql(connection, "composition").set_index("part")
    assert (composition.num_samples["dogs"], composition.num_pictures["dogs"]) == (5, 4)
    assert composition.share["dogs"] == pytest.approx(5 / 7)
    assert run_sql(connection, "query_sets").set_index("query_set").num_final["dogs"] == 5
    assert run_sql(connection, "pictures").image_id.is_unique
    exported.write("manifest", 1, exported.read("manifest", 1)[:-1])
    exported.change("retrieval", 2_000_000, 0, num_taken=6)
    found = run_checks(exported.connect())
    assert found == {"choices_match_retrieval": 1, "manifest_matches_selection": 1}


def test_a_picture_that_was_taken_once_is_not_twice_in_the_manifest(exported: Any):
    rows = exported.read("manifest", 1)
    exported.write("manifest", 1, [*rows, rows[0] | {"key": "000000006"}])
    assert run_checks(exported.connect()) == {"manifest_matches_selection": 1, "manifest_unique": 1}


def test_an_empty_plan_of_an_empty_selection_is_no_problem(exported: Any):
    empty_the_plan(exported)
    for name in ("selection", "choices"):
        for part in (exported.run / name).glob("part-*.parquet"):
            part.unlink()
    assert len(run_sql(exported.connect(), "manifest_matches_selection")) == 0


def test_a_run_without_any_part_has_all_views(tmp_path: Path):
    connection = connect(tmp_path / "pool", tmp_path / "run", {}, set())
    for name, table in TABLES.items():
        assert [row[0] for row in connection.execute(f'DESCRIBE "{name}"').fetchall()] == table.schema.names
    for kind in ("views", "reports", "checks"):
        for name in names_of(kind):
            assert len(run_sql(connection, name)) == 0


def test_other_sources_of_a_pool_and_other_shards_are_not_seen(exported: Any):
    some = connect(exported.pool, exported.run, {}, {0, 3})
    assert set(run_sql(some, "end_state").source) == {"bench", "web"}
    first = connect(exported.pool, exported.run, {}, {0, 1, 2, 3}, [0, 1_000_000, 2_000_000, WEB])
    assert run_sql(first, "funnel").num_in[0] == 6


def test_folders_of_models_are_followed(exported: Any):
    (exported.pool / "hashes").rename(exported.pool / "moved")
    (exported.pool / "moved").rename(exported.pool / "hashes-model")
    connection = connect(exported.pool, exported.run, {"hashes": "hashes-model"}, {0, 1, 2, 3})
    assert connection.execute("SELECT count(*) FROM hashes").fetchone()[0] > 0


def test_files_and_errors(exported: Any, tmp_path: Path):
    connection = exported.connect()
    file = tmp_path / "mine.sql"
    file.write_text("SELECT count(*) AS n FROM manifest")
    assert run_sql(connection, str(file)).n[0] == 6
    with pytest.raises(ConfigError, match="sql 'fun' is not known; reports: clusters, component_sizes, "):
        run_sql(connection, "fun")
    file.write_text("SELECT nonsense")
    with pytest.raises(ConfigError, match="nonsense"):
        run_sql(connection, str(file))


@pytest.mark.parametrize("kind", ["views", "reports", "checks"])
def test_every_file_says_its_grain(kind: str):
    from curation.query import SQL

    for file in (SQL / kind).glob("*.sql"):
        assert file.read_text().startswith("-- Grain: "), file
