import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation.ingest import screen as screening
from curation.ingest.address import AddressError, canonical_url, parse_address
from curation.ingest.screen import (
    Rules,
    ScreenConfig,
    Screened,
    ScreenKeys,
    UrlDuplicates,
    num_ranges_of,
    repeats,
    repeats_of_range,
    url_keys,
)
from curation.schema import TABLES, Part, image_ids
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
        self.io, self.pool_shards, self.num_tasks = io, shards, []

    def shards(self, *roles):
        assert roles == ("pool",)
        return self.pool_shards

    def part(self, table, index):
        return self.io.part(table, index)

    def num_rows(self, part):
        return self.io.read(part).num_rows

    def map(self, tasks):
        self.num_tasks.append(len(tasks))
        for task in tasks:
            table = task.function(self.io, **task.args)
            assert table.schema.equals(TABLES[task.writes.folder].schema)
            assert all(part in [Part("run", *key) for key in self.io.tables] for part in task.reads)
            self.io.tables[task.writes.folder, task.writes.index] = table


def screen(io, config, tables, roles=None):
    """All three stages over shards, in order of their numbers; the verdict's rows by shard."""
    roles = roles or {}
    for shard, lines in sorted(tables.items()):
        io.tables["urls", shard] = lines
        io.shard, io.role = shard, roles.get(shard, "pool")
        table = ScreenKeys(config).run(shard, io)["url_keys"]
        assert table.schema.equals(TABLES["url_keys"].schema)
        io.tables["url_keys", shard] = table
    planner = Planner(io, [shard for shard in sorted(tables) if roles.get(shard, "pool") == "pool"])
    UrlDuplicates(config).run(planner, planner.map)
    num_keys = sum(io.read(part).num_rows for part in io.parts("url_order"))
    assert planner.num_tasks[1] == num_ranges_of(num_keys, config.memory_mb * 1_000_000)
    out = {}
    for shard in tables:
        io.shard, io.role = shard, roles.get(shard, "pool")
        table = Screened(config).run(shard, io)["screened"]
        assert table.schema.equals(TABLES["screened"].schema)
        assert table["keep"].to_pylist() == [reason is None for reason in table["reason"].to_pylist()]
        out[shard] = table["reason"].to_pylist()
    return out


def reasons_of(rules, *urls):
    """What the rules say of lines that registration let through."""
    nothing = np.zeros(len(urls), bool)
    return rules.judge(pa.array(urls, pa.string()), nothing, nothing).reason.to_pylist()


CONFIG = ScreenConfig(blocked_hosts=["bad.test", "*.worse.test"], blocked_urls=["/track/", "http://a.test/private"])
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
    found = pa.concat_tables(memory_io.read(part) for part in memory_io.parts("url_duplicates")).to_pylist()
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
    urls = ("http://x.bad.test/", "http://a.test/nothing", "http://b.test/no")
    assert reasons_of(rules, *urls) == ["blocked_host", "blocked_url", None]
    (tmp_path / "a.txt").write_text("other.test\n")
    assert first.fingerprint_values() != second.fingerprint_values()


def test_block_lists_may_be_hosts_files(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(
        "127.0.0.1 localhost\n0.0.0.0 ads.example\ttrack.example # both\n::1 six.example\n", encoding="utf-8"
    )
    rules = Rules(ScreenConfig(block_list_files=[str(path)]))
    urls = [f"http://{host}/a.jpg" for host in ("ads.example", "a.track.example", "six.example", "0.0.0.0.example")]
    assert reasons_of(rules, *urls) == ["blocked_host"] * 3 + [None]


def test_blocked_hosts_may_be_written_in_any_alphabet():
    rules = Rules(ScreenConfig(blocked_hosts=["*.b\u00fccher.example"]))
    urls = ("http://B\u00dcCHER.example/a.jpg", "http://a.xn--bcher-kva.example/a.jpg")
    assert reasons_of(rules, *urls) == ["blocked_host"] * 2


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


def test_keys_are_of_the_sha256():
    import hashlib

    expected = [int.from_bytes(hashlib.sha256(url).digest()[:8], "big") for url in (b"http://a.test/", b"x")]
    assert url_keys(["http://a.test/", "x"]).tolist() == expected
    assert url_keys([]).tolist() == []


def test_ranges_follow_from_the_keys_and_the_memory():
    keys_of_mb = 1_000_000 // screening._BYTES_OF_KEY
    assert [num_ranges_of(num, 1_000_000) for num in (0, keys_of_mb, keys_of_mb + 1, 3 * keys_of_mb)] == [1, 1, 2, 4]
    assert num_ranges_of(1_300_000_000, 500_000_000) == 256
    assert num_ranges_of(1 << 40, 1) == 1 << 16


def test_ranges_and_groups_change_no_duplicate(memory_io, monkeypatch):
    """Many groups and ranges against one of each; what a group writes does not depend on how many ranges there are."""
    urls = [[f"http://a.test/{n * step % 700}" for n in range(300)] for step in (1, 3, 7, 11)]
    tables = {shard: urls_table(shard, lines) for shard, lines in enumerate(urls)}
    whole = screen(memory_io, CONFIG, tables)
    duplicates = pa.concat_tables(memory_io.read(part) for part in memory_io.parts("url_duplicates"))
    seen: dict[str, int] = {}
    for shard, lines in enumerate(urls):
        for row, url in enumerate(lines):
            assert whole[shard][row] == ("duplicate_url" if url in seen else None)
            seen.setdefault(url, shard * 1_000_000 + row)
    memory_io.tables.clear()
    monkeypatch.setattr(screening, "_ROWS_IN_GROUP", 600)
    monkeypatch.setattr(screening, "_BYTES_OF_KEY", 25_000)
    assert screen(memory_io, CONFIG.model_copy(update={"memory_mb": 1}), tables) == whole
    assert [len(memory_io.parts(name)) for name in ("url_order", "url_repeats", "url_duplicates")] == [2, 32, 2]
    assert pa.concat_tables(memory_io.read(part) for part in memory_io.parts("url_duplicates")).equals(duplicates)
    for part in memory_io.parts("url_order"):
        table = memory_io.read(part)
        assert table["url_key"].to_numpy().tolist() == sorted(table["url_key"].to_numpy().tolist())
        assert [key >> 48 for key in table["url_key"].to_pylist()] == table["bucket"].to_pylist()


def duplicates_of(io, shards, *, rows_in_group, num_ranges=4):
    """What the stage finds among keys by shard: id and first id; and how many rows are compared between groups."""
    for shard, keys in enumerate(shards):
        columns = [image_ids(shard, len(keys)), pa.nulls(len(keys), pa.string()), pa.array(keys, pa.uint64())]
        io.tables["url_keys", shard] = pa.table(columns, schema=TABLES["url_keys"].schema)
    num_keys = sum(len(keys) for keys in shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "_ROWS_IN_GROUP", rows_in_group)
        patch.setattr(screening, "_BYTES_OF_KEY", max(1, num_ranges * 1_000_000 // max(1, num_keys)))
        planner = Planner(io, list(range(len(shards))))
        UrlDuplicates(ScreenConfig(memory_mb=1)).run(planner, planner.map)
    found = [row for part in io.parts("url_duplicates") for row in io.read(part).to_pylist()]
    num_repeats = sum(io.read(part).num_rows for part in io.parts("url_repeats"))
    return [(row["image_id"], row["first_id"]) for row in found], num_repeats


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.sampled_from([n << 62 | n for n in range(4)] + [1, 2, 3]), max_size=9), max_size=9),
    st.integers(1, 20),
)
def test_duplicates_against_a_dictionary(memory_io, shards, rows_in_group):
    memory_io.tables.clear()
    seen, expected = {}, []
    for shard, keys in enumerate(shards):
        for row, key in enumerate(keys):
            image_id = shard * 1_000_000 + row
            if seen.setdefault(key, image_id) != image_id:
                expected.append((image_id, seen[key]))
    assert duplicates_of(memory_io, shards, rows_in_group=rows_in_group)[0] == expected


def test_one_address_on_all_lines_takes_no_memory_between_groups(memory_io):
    num_shards, rows = 16, 50_000
    found, num_repeats = duplicates_of(memory_io, [np.full(rows, 7)] * num_shards, rows_in_group=rows)
    assert [row[0] for row in found] == [s * 1_000_000 + n for s in range(num_shards) for n in range(rows)][1:]
    assert {row[1] for row in found} == {0}
    assert num_repeats == num_shards - 1
    tracemalloc.start()
    repeats_of_range(memory_io, groups=list(range(num_shards)), buckets=[0, 1 << 16])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 78 * 2 * rows  # 78 bytes a line were 62 MB


# One line at a time, as simply as it can be said: what Rules.judge says of all at once.

RULES = {
    "schemes": ["http", "https", "ftp"],
    "blocked_hosts": ["bad.test", "*.worse.test", "10.0.0.1"],
    "blocked_urls": ["/track/", "http://a.test/private", "b.test/x/", "ftp://c.test/", "?id="],
}


def by_one(url, is_here):
    try:
        one, canonical = parse_address(url), canonical_url(url)
    except AddressError:
        return None if is_here else "broken_line"
    if one.scheme not in RULES["schemes"] and not is_here:
        return "scheme"
    below = [host.removeprefix("*.") for host in RULES["blocked_hosts"]]
    if any(f".{one.host}".endswith(f".{host}") for host in below):
        return "blocked_host"
    path = canonical.split("://", 1)[-1].partition("/")[2]
    begins = canonical.startswith(("http://a.test/private", "ftp://c.test/"))
    below_b = f".{one.host}".endswith(".b.test") and path.startswith("x/")
    return "blocked_url" if begins or below_b or any(part in canonical for part in ("/track/", "?id=")) else None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["http://", "https://", "HTTP://", "ftp://", "data:", ""]),
            st.sampled_from(["", "x.", "10.0.0.1", "u@"]),
            st.sampled_from(["a.test", "b.test", "bad.test", "worse.test", "c.test", "A.test:80", "notbad.test", ""]),
            st.sampled_from(["", "/", "/x/", "/x", "/y/../x/z", "/track/", "/private/y", "/%70rivate", "/a?id=1"]),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_rules_against_one_line_at_a_time(rows):
    urls = ["".join(row[:4]) for row in rows]
    is_here = np.array([row[4] for row in rows], bool)
    rules = Rules(ScreenConfig(**RULES))
    judged = rules.judge(pa.array(urls, pa.string()), np.zeros(len(rows), bool), is_here)
    assert judged.reason.to_pylist() == [
        by_one(url.replace("://u@", "://"), here) for url, here in zip(urls, is_here, strict=True)
    ]
    assert [rules.blocks(url) for url in urls] == [by_one(url.replace("://u@", "://"), True) for url in urls]
