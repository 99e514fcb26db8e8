import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.ingest.register import register
from curation.ingest.rows import MAX_LETTERS
from curation.ingest.sources import SourceConfig, read_lines
from curation.schema import TABLES
from training.config import ConfigError


class Pool:
    def __init__(self):
        self.sources = None
        self.shards = {}
        self.stamps = {}
        self.written = []

    def register(self, *named, shard_rows=10):
        self.written = []

        def write(shard, table):
            assert table.schema.equals(TABLES["urls"].schema)
            self.written.append(shard)
            self.shards[shard] = table

        self.sources = register(list(named), self.sources, shard_rows=shard_rows, write=write, stamps=self.stamps)
        assert self.sources.schema.equals(TABLES["sources"].schema)
        return self.sources


def url_list(path, num_rows, start=0):
    path.write_text("".join(f"http://h{n}.test/{n}.jpg\n" for n in range(start, start + num_rows)))
    return SourceConfig(location=str(path), kind="list")


def test_ids_follow_from_source_and_position(tmp_path):
    pool = Pool()
    first, second = url_list(tmp_path / "a.txt", 25), url_list(tmp_path / "b.txt", 3)
    sources = pool.register(("a", "pool", first), ("b", "query", second)).to_pylist()
    assert [(row["source_id"], row["role"], row["num_rows"], row["num_shards"]) for row in sources] == [
        (0, "pool", 25, 3),
        (1, "query", 3, 1),
    ]
    assert pool.written == [0, 1, 2, 1_000_000]
    last = pool.shards[2].to_pylist()
    assert [(row["image_id"], row["line"], row["host"]) for row in last][:2] == [
        (2_000_000, 20, "h20.test"),
        (2_000_001, 21, "h21.test"),
    ]
    assert pool.shards[1_000_000]["image_id"].to_pylist()[0] == 1_000_000_000_000


def test_rows_tell_their_file_and_another_file_with_the_same_rows_is_the_same_source(tmp_path):
    pool = Pool()
    (tmp_path / "lists").mkdir()
    whole = url_list(tmp_path / "whole.txt", 5)
    pool.register(("a", "pool", whole))
    rows = pool.shards[0].to_pylist()
    assert [(row["file"], row["file_line"], row["line"]) for row in rows] == [("whole.txt", n + 1, n) for n in range(5)]
    url_list(tmp_path / "lists/1.txt", 3)
    url_list(tmp_path / "lists/2.txt", 4, start=3)
    before = pool.sources["digest"].to_pylist()
    cut = SourceConfig(location=str(tmp_path / "lists"), kind="list")
    assert pool.register(("a", "pool", cut))["digest"].to_pylist() != before  # two rows more, and no error
    rows = pool.shards[0].to_pylist()
    assert [(row["file"], row["file_line"], row["line"]) for row in rows] == [
        *(("1.txt", n + 1, n) for n in range(3)),
        *(("2.txt", n - 2, n) for n in range(3, 7)),
    ]


def test_an_unchanged_source_writes_nothing(tmp_path):
    pool = Pool()
    config = url_list(tmp_path / "a.txt", 20)
    before = pool.register(("a", "pool", config))
    assert pool.register(("a", "pool", config)).equals(before)
    assert pool.written == []


def backdated(config, seconds=60):
    """The same source, as if nobody had touched it for a while."""
    path = Path(config.location)
    then = path.stat().st_mtime_ns - int(seconds * 1e9)
    os.utime(path, ns=(then, then))
    return config


def test_a_source_whose_files_are_as_they_were_is_not_read_again(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("curation.ingest.register.read_lines", lambda config: read.append(1) or read_lines(config))
    pool = Pool()
    config = backdated(url_list(tmp_path / "a.txt", 25))
    before = pool.register(("a", "pool", config))
    assert pool.register(("a", "pool", config)).equals(before)
    assert len(read) == 1
    pool.register(("a", "pool", config.model_copy(update={"expected_rows": 7})))
    assert len(read) == 1
    pool.register(("a", "pool", backdated(config)))  # same rows, another time
    assert len(read) == 2
    grown = backdated(url_list(tmp_path / "a.txt", 28), seconds=60)
    assert pool.register(("a", "pool", grown))["num_rows"].to_pylist() == [28]
    other = url_list(tmp_path / "a.txt", 28, start=100)
    with pytest.raises(ConfigError, match="changed instead of being extended"):
        pool.register(("a", "pool", backdated(other, seconds=120)))


def test_what_was_read_is_told_with_what_is_registered(tmp_path):
    """Killed between the two, and then the list was put back: its rows are not those that are registered."""
    pool = Pool()
    pool.register(("a", "pool", backdated(url_list(tmp_path / "a.txt", 25))))
    before, then = dict(pool.stamps), (tmp_path / "a.txt").stat().st_mtime_ns
    pool.register(("a", "pool", backdated(url_list(tmp_path / "a.txt", 28))))
    pool.stamps = before
    config = url_list(tmp_path / "a.txt", 25)
    os.utime(config.location, ns=(then, then))
    with pytest.raises(ConfigError, match="it has 25 rows and had 28"):
        pool.register(("a", "pool", config))


def test_a_file_that_was_just_written_is_not_relied_upon(tmp_path):
    """Another of the same size may be written within what a file system's clock tells apart."""
    pool = Pool()
    config = url_list(tmp_path / "a.txt", 25)
    pool.register(("a", "pool", config))
    then = Path(config.location).stat().st_mtime_ns
    url_list(tmp_path / "a.txt", 26)
    os.utime(config.location, ns=(then, then))
    assert pool.register(("a", "pool", config))["num_rows"].to_pylist() == [26]


@pytest.mark.parametrize(
    ("before", "after", "written"), [(25, 28, [2]), (25, 45, [2, 3, 4]), (20, 21, [2]), (0, 5, [0])]
)
def test_an_extended_source_writes_what_grew(tmp_path, before, after, written):
    pool, fresh = Pool(), Pool()
    pool.register(("a", "pool", url_list(tmp_path / "a.txt", before)))
    config = url_list(tmp_path / "a.txt", after)
    pool.register(("a", "pool", config))
    assert pool.written == written
    fresh.register(("a", "pool", config))
    assert pool.sources.equals(fresh.sources)
    assert {shard: table.to_pylist() for shard, table in pool.shards.items()} == {
        shard: table.to_pylist() for shard, table in fresh.shards.items()
    }


def test_a_source_keeps_its_number_and_stays(tmp_path):
    pool = Pool()
    a, b, c = (url_list(tmp_path / f"{name}.txt", 3) for name in "abc")
    pool.register(("a", "pool", a), ("b", "pool", b))
    sources = pool.register(("c", "benchmark", c), ("b", "pool", b))
    assert dict(zip(sources["name"].to_pylist(), sources["source_id"].to_pylist(), strict=True)) == {
        "a": 0,
        "b": 1,
        "c": 2,
    }
    assert pool.written == [2_000_000]


@pytest.mark.parametrize(
    ("num_rows", "start", "how"),
    [
        (25, 1, "its first 25 rows are not those"),
        (40, 1, "its first 25 rows are not"),
        (24, 0, "it has 24 rows and had 25"),
    ],
)
def test_a_changed_source_is_an_error_before_anything_is_written(tmp_path, num_rows, start, how):
    pool = Pool()
    pool.register(("a", "pool", url_list(tmp_path / "a.txt", 25)))
    with pytest.raises(ConfigError, match=f"sources.a: source 'a' changed instead of being extended: {how}"):
        pool.register(("a", "pool", url_list(tmp_path / "a.txt", num_rows, start)))
    assert pool.written == []


def test_a_picture_of_another_size_is_another_picture(tmp_path, make_picture):
    pool = Pool()
    (tmp_path / "x.png").write_bytes(make_picture())
    config = SourceConfig(location=str(tmp_path), kind="folder")
    pool.register(("a", "pool", config))
    (tmp_path / "x.png").write_bytes(make_picture() + b"more")
    with pytest.raises(ConfigError, match="changed instead of being extended"):
        pool.register(("a", "pool", config))


def test_the_place_of_a_source_may_change(tmp_path):
    pool = Pool()
    pool.register(("a", "pool", url_list(tmp_path / "a.txt", 5)))
    sources = pool.register(("a", "pool", url_list(tmp_path / "moved.txt", 5)))
    assert pool.written == []
    assert sources["location"].to_pylist() == [str(tmp_path / "moved.txt")]


def test_other_shards_other_role_missing_path(tmp_path):
    pool = Pool()
    config = url_list(tmp_path / "a.txt", 5)
    pool.register(("a", "pool", config))
    with pytest.raises(ConfigError, match="shard_rows: 20, but this pool was made with 10"):
        pool.register(("a", "pool", config), shard_rows=20)
    with pytest.raises(ConfigError, match=r"benchmarks\.a: the pool knows 'a' as one of its sources"):
        pool.register(("a", "benchmark", config))
    with pytest.raises(ConfigError, match=r"queries\.q\.location: 'gone\.txt' does not exist"):
        pool.register(("q", "query", SourceConfig(location="gone.txt", kind="list")))


def damaged(path, kind):
    """A list with damage behind its header; the rows before it are more than a shard."""
    lines = [f"http://h{n}.test/{n * n % 997}.jpg" for n in range(9000)]
    if kind == "parquet":
        pq.write_table(pa.table({"url": lines}), path, row_group_size=4096, compression="none", use_dictionary=False)
        data = bytearray(path.read_bytes())
        start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
        data[start : start + 40] = b"\xff" * 40
    elif kind == "text":
        pq.write_table(pa.table({"url": lines}), path, compression="none", use_dictionary=False)
        data = bytearray(path.read_bytes().replace(b"http://h8000.", b"http://\xff8000."))
    else:
        data = bytearray(gzip.compress("\n".join(lines).encode()))
        half = len(data) // 2
        data[half:] = b"" if kind == "cut" else bytes(byte ^ 0xFF for byte in data[half:])
    path.write_bytes(data)
    return SourceConfig(location=str(path), kind="list")


@pytest.mark.parametrize(("name", "kind"), [("a.txt.gz", "cut"), ("a.txt.gz", "flipped"), ("a.parquet", "parquet")])
def test_a_damaged_list_is_said_in_one_line(tmp_path, name, kind):
    config = damaged(tmp_path / name, kind)
    with pytest.raises(ConfigError, match=r"^sources\.a: location '.*' cannot be read to its end: .") as caught:
        Pool().register(("a", "pool", config))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_damaged_text_of_parquet_is_a_row_among_the_others(tmp_path):
    pool = Pool()
    sources = pool.register(("a", "pool", damaged(tmp_path / "a.parquet", "text")), shard_rows=9000).to_pylist()
    assert [row["num_rows"] for row in sources] == [9000]
    rows = pool.shards[0].to_pylist()
    assert [(row["line"], row["error"]) for row in rows if row["error"] is not None] == [(8000, "not utf-8")]
    assert rows[8000]["url"] == f"http://\ufffd8000.test/{8000 * 8000 % 997}.jpg"


def test_a_damaged_header_is_said_in_one_line(tmp_path):
    data = bytearray(gzip.compress(b"url,alt_text\n" + b"http://a.test/1.jpg,x\n" * 9))
    data[10] = 0xFF  # no kind of deflate block
    (tmp_path / "a.csv.gz").write_bytes(data)
    with pytest.raises(ConfigError, match=r"sources\.a\.location: '.*a\.csv\.gz' is no csv"):
        Pool().register(("a", "pool", SourceConfig(location=str(tmp_path / "a.csv.gz"), kind="list")))


def test_what_goes_wrong_with_writing_is_not_the_list(tmp_path):
    def write(shard, table):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        register([("a", "pool", url_list(tmp_path / "a.txt", 25))], None, shard_rows=10, write=write, stamps={})


def test_broken_lines_have_ids_too(tmp_path):
    pool = Pool()
    (tmp_path / "a.txt").write_text("\nnot an address\nhttp://A.test/x.jpg\n")
    pool.register(("a", "pool", SourceConfig(location=str(tmp_path / "a.txt"), kind="list")))
    rows = pool.shards[0].to_pylist()
    assert [(row["image_id"], row["host"], row["error"]) for row in rows] == [
        (0, None, "empty line"),
        (1, None, "no scheme"),
        (2, "a.test", None),
    ]


LONG = "ü" * (MAX_LETTERS + 1)


def as_list(path):
    values = [{"url": f"http://a.test/{n}", "page_url": LONG, "alt_text": LONG, "label": LONG} for n in (1, LONG)]
    path.write_text("".join(json.dumps(one) + "\n" for one in values))
    return SourceConfig(location=str(path), kind="list")


def as_tar(path):
    sidecars = [{"url": "http://a.test/1", "page_url": LONG, "label": LONG}, {"url": LONG, "alt_text": LONG}]
    with tarfile.open(path, "w") as tar:
        for place, values in enumerate(sidecars):
            for name, data in (("jpg", b""), ("json", json.dumps(values).encode()), ("txt", LONG.encode())):
                info = tarfile.TarInfo(f"{place}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return SourceConfig(location=str(path), kind="tar")


@pytest.mark.parametrize(("name", "write"), [("a.jsonl", as_list), ("a.tar", as_tar)])
def test_long_texts_are_cut_and_long_addresses_are_none(tmp_path, name, write):
    pool = Pool()
    config = write(tmp_path / name)
    sources = pool.register(("a", "pool", config))
    first, second = pool.shards[0].to_pylist()
    for row in (first, second):
        texts = [row[key] for key in ("url", "page_url", "alt_text", "label") if row[key] is not None]
        assert max(map(len, texts)) == MAX_LETTERS
        assert row["alt_text"] == "ü" * MAX_LETTERS
    assert (first["url"], first["error"], first["page_url"]) == ("http://a.test/1", None, "ü" * MAX_LETTERS)
    assert (second["error"], second["host"]) == ("an address of more than 8,192 letters", None)
    # Pools in which such texts stand whole know their sources again.
    read = "".join(json.dumps(line.row, separators=(",", ":")) + "\n" for line in read_lines(config))
    assert sources["digest"].to_pylist() == [hashlib.sha256(read.encode()).hexdigest()]


def test_what_is_wrong_with_a_long_address_is_no_long_text(tmp_path):
    pool = Pool()
    (tmp_path / "a.txt").write_text("http://a.test:" + "p" * 20_000 + "/x.jpg\n")
    pool.register(("a", "pool", SourceConfig(location=str(tmp_path / "a.txt"), kind="list")))
    assert pool.shards[0]["error"].to_pylist() == ["an address of more than 8,192 letters"]
