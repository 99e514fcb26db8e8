import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.ingest.screen import Rules, ScreenConfig, Screened, ScreenKeys, UrlDuplicates, repeats
from curation.schema import TABLES, image_ids
from training.config import ConfigError


def urls_table(shard, urls, location=None, errors=None):
    num_rows = len(urls)
    columns = {
        "image_id": image_ids(shard, num_rows),
        "source": ["s"] * num_rows,
        "line": range(num_rows),
        "url": urls,
        "location": location or [None] * num_rows,
        "error": errors or [None] * num_rows,
    }
    arrays = [pa.array(columns.get(f.name, [None] * num_rows), f.type) for f in TABLES["urls"].schema]
    return pa.Table.from_arrays(arrays, schema=TABLES["urls"].schema)


class Planner:
    """The part of Context that the stage asks, over tables in memory."""

    def __init__(self, io, shards):
        self.io, self.pool_shards, self.num_tasks = io, shards, 0

    def shards(self, *roles):
        assert roles == ("pool",)
        return self.pool_shards

    def part(self, table, index):
        return self.io.part(table, index)

    def map(self, tasks):
        self.num_tasks = len(tasks)
        for task in tasks:
            table = task.function(self.io, **task.args)
            assert table.schema.equals(TABLES["url_duplicates"].schema)
            self.io.tables[task.writes.folder, task.writes.index] = table


def screen(io, config, tables, roles=None):
    """All three stages over shards; the verdict's rows by shard."""
    roles = roles or {}
    for shard, table in tables.items():
        io.tables["urls", shard] = table
        io.shard, io.role = shard, roles.get(shard, "pool")
        io.tables["url_keys", shard] = ScreenKeys(config).run(shard, io)["url_keys"]
    planner = Planner(io, [shard for shard in tables if roles.get(shard, "pool") == "pool"])
    UrlDuplicates(config).run(planner, planner.map)
    assert planner.num_tasks == config.key_ranges
    out = {}
    for shard in tables:
        io.shard, io.role = shard, roles.get(shard, "pool")
        table = Screened(config).run(shard, io)["screened"]
        assert table.schema.equals(TABLES["screened"].schema)
        assert table["keep"].to_pylist() == [reason is None for reason in table["reason"].to_pylist()]
        out[shard] = table["reason"].to_pylist()
    return out


CONFIG = ScreenConfig(
    blocked_hosts=["bad.test", "*.worse.test"], blocked_urls=["/track/", "http://a.test/private"], key_ranges=3
)
LINES = {
    "http://a.test/1": None,
    "https://a.test/1": None,
    "ftp://a.test/1": "scheme",
    "data:image/png;base64,xx": "scheme",
    "http://bad.test/1": "blocked_host",
    "http://cdn.bad.test:8080/1": "blocked_host",
    "http://notbad.test/1": None,
    "http://x.worse.test/1": "blocked_host",
    "http://b.test/track/1": "blocked_url",
    "http://A.TEST:80/private/1": "blocked_url",
    "http://b.test/?u=http://a.test/private": None,
    "http://A.test:80/1#x": "duplicate_url",
}


def test_rules_in_order(memory_io):
    reasons = screen(memory_io, CONFIG, {0: urls_table(0, [*LINES, ""], errors=[*[None] * len(LINES), "empty line"])})
    assert dict(zip(LINES, reasons[0], strict=False)) == LINES
    assert reasons[0][-1] == "broken_line"


def test_the_first_line_of_all_shards_wins(memory_io):
    tables = {
        3: urls_table(3, ["http://a.test/1", "http://a.test/2", "http://a.test/2"]),
        1: urls_table(1, ["http://a.test/3", "HTTP://a.test/2"]),
        2: urls_table(2, ["http://a.test/1"]),
    }
    reasons = screen(memory_io, CONFIG, tables)
    assert reasons == {1: [None, None], 2: [None], 3: ["duplicate_url"] * 3}
    found = pa.concat_tables([memory_io.tables["url_duplicates", n] for n in range(3)]).to_pylist()
    assert {row["image_id"]: row["first_id"] for row in found} == {
        3_000_000: 2_000_000,
        3_000_001: 1_000_001,
        3_000_002: 1_000_001,
    }


def test_query_sets_and_benchmarks_lose_broken_lines_only(memory_io):
    lines = ["http://bad.test/1", "http://a.test/1", "http://a.test/1", "ftp://a.test/x", ""]
    tables = {n: urls_table(n, lines, errors=[None, None, None, None, "empty line"]) for n in (0, 1, 2)}
    reasons = screen(memory_io, CONFIG, tables, {0: "benchmark", 1: "query"})
    assert reasons[0] == reasons[1] == [None, None, None, None, "broken_line"]
    assert reasons[2] == ["blocked_host", None, "duplicate_url", "scheme", "broken_line"]


def test_local_rows_pass(memory_io):
    table = urls_table(0, [None, None], location=["a.jpg", "b.jpg"])
    assert screen(memory_io, CONFIG, {0: table}) == {0: [None, None]}


def test_pictures_that_say_where_they_came_from_meet_the_block_lists_only(memory_io):
    lines = {
        "http://cdn.bad.test/1": "blocked_host",
        "http://b.test/track/1": "blocked_url",
        "ftp://bad.test/1": "blocked_host",
        "ftp://a.test/1": None,
        "a note": None,
        "http://a.test/1": None,
        "HTTP://a.test:80/1": None,  # one address may be of several pictures
    }
    tables = {shard: urls_table(shard, list(lines), location=["image/0"] * len(lines)) for shard in (0, 1)}
    reasons = screen(memory_io, CONFIG, tables, {1: "query"})
    assert dict(zip(lines, reasons[0], strict=True)) == lines
    assert reasons[1] == [None] * len(lines)


def test_block_list_files_count_by_content(tmp_path):
    (tmp_path / "a.txt").write_text("# hosts\nbad.test\n\nhttp://a.test/no  # prefix\n")
    (tmp_path / "b.txt").write_text("http://a.test/no\nbad.test\n")
    first, second = (ScreenConfig(block_list_files=[str(tmp_path / name)]) for name in ("a.txt", "b.txt"))
    assert first.fingerprint_values() == second.fingerprint_values()
    assert first.fingerprint_values() != ScreenConfig().fingerprint_values()
    rules = Rules(first)
    assert [rules.judge(url)[0] for url in ("http://x.bad.test/", "http://a.test/nothing", "http://b.test/no")] == [
        "blocked_host",
        "blocked_url",
        None,
    ]
    (tmp_path / "a.txt").write_text("other.test\n")
    assert first.fingerprint_values() != second.fingerprint_values()


def test_block_lists_may_be_hosts_files(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(
        "127.0.0.1 localhost\n0.0.0.0 ads.example\ttrack.example # both\n::1 six.example\n", encoding="utf-8"
    )
    rules = Rules(ScreenConfig(block_list_files=[str(path)]))
    for host in ("ads.example", "a.track.example", "six.example"):
        assert rules.judge(f"http://{host}/a.jpg")[0] == "blocked_host"
    assert rules.judge("http://0.0.0.0.example/a.jpg")[0] is None


def test_blocked_hosts_may_be_written_in_any_alphabet():
    rules = Rules(ScreenConfig(blocked_hosts=["*.b\u00fccher.example"]))
    assert rules.judge("http://B\u00dcCHER.example/a.jpg")[0] == "blocked_host"
    assert rules.judge("http://a.xn--bcher-kva.example/a.jpg")[0] == "blocked_host"


def test_a_missing_block_list_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"screen\.block_list_files: 'gone\.txt': No such file"):
        ScreenKeys(ScreenConfig(block_list_files=["gone.txt"])).preflight()


@given(st.lists(st.integers(0, 5), max_size=40), st.randoms(use_true_random=False))
def test_repeats_against_a_dictionary(keys, random):
    ids = list(range(len(keys)))
    random.shuffle(ids)
    least = {}
    for key, image_id in zip(keys, ids, strict=True):
        least[key] = min(least.get(key, image_id), image_id)
    expected = sorted((i, least[k]) for k, i in zip(keys, ids, strict=True) if least[k] != i)
    found = repeats(np.array(keys, np.uint64), np.array(ids, np.int64))
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected
