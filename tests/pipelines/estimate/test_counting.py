import gzip
import io
import json
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.ingest.sources import SourceConfig, source_files
from pipelines.estimate import counting
from pipelines.estimate.counting import count_crawl, count_source
from training.config import ConfigError


def count(kind, location, **values):
    return count_source("sources.web", SourceConfig(kind=kind, location=str(location), **values))


def address(n):
    return f"https://host{n % 97}.test/pictures/{n:07d}.jpg"


def test_small_lists_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("http://a.test/1\nhttp://a.test/2")
    (tmp_path / "a.csv").write_text("url\nhttp://a.test/1\nhttp://a.test/2\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"url": "http://a.test/1"}\n') * 3)
    (tmp_path / "a.json").write_text(json.dumps([{"url": "http://a.test/1"}] * 4))
    with pa.output_stream(tmp_path / "a.txt.zst", compression="zstd") as stream:
        stream.write(b"http://a.test/1\n" * 5)
    for name, rows in (("a.txt", 2), ("a.csv", 2), ("a.jsonl.gz", 3), ("a.json", 4), ("a.txt.zst", 5)):
        found = count("list", tmp_path / name)
        assert (found.rows, found.is_exact, found.source) == (rows, True, "counted"), name


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_long_lists_are_told_from_a_sample(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(counting, "_SAMPLE_BYTES", 1 << 16)
    text = "url\n" + "".join(f"{address(n * 7919 % 200_000)}\n" for n in range(200_000))
    path = tmp_path / f"list.csv{suffix}"
    if suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        with pa.output_stream(path, compression="zstd" if suffix else None) as stream:
            stream.write(text.encode())
    found = count("list", path)
    assert not found.is_exact
    assert found.source == "about: size and mean line of a sample"
    assert found.rows == pytest.approx(200_000, rel=0.05)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_sample_that_unpacks_to_much_is_cut(tmp_path, suffix, monkeypatch):
    text = b"".join(b"%s\n" % (b"http://a.test/%d" % n).ljust(99, b"x") for n in range(100_000))
    if suffix == ".gz":
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text[:1000]) + gzip.compress(text[1000:]))
    else:
        with pa.output_stream(tmp_path / "a.txt.zst", compression="zstd") as stream:
            stream.write(text)
    monkeypatch.setattr(counting, "_UNPACKED_BYTES", 1 << 20)
    tracemalloc.start()
    try:
        found = count("list", tmp_path / f"a.txt{suffix}")
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
    assert not found.is_exact
    if suffix == ".gz":
        assert found.rows == pytest.approx(100_000, rel=0.3)
    assert 10_000 < found.rows < 200_000  # of zstd it is not known to the byte how many were unpacked
    monkeypatch.undo()
    found = count("list", tmp_path / f"a.txt{suffix}")
    assert (found.rows, found.is_exact) == (100_000, True)


def test_parquet_is_told_by_its_metadata(tmp_path, monkeypatch):
    for n in range(6):
        table = pa.table({"url": [address(i) for i in range(100)], "image": [b"x" * 50] * 100})
        pq.write_table(table, tmp_path / f"{n}.parquet", compression="none", use_dictionary=False)
    assert count("list", tmp_path / "*.parquet").rows == 600
    found = count("parquet", tmp_path)
    assert (found.rows, found.source) == (600, "parquet metadata")
    assert 50 < found.picture_bytes < 200
    monkeypatch.setattr(counting, "_METADATA_FILES", 2)
    found = count("list", tmp_path / "*.parquet")
    assert (found.rows, found.is_exact) == (600, False)
    assert found.source == "about: parquet metadata of 2 of 6 files"


def test_folders_are_listed_as_far_as_time_goes(tmp_path, monkeypatch):
    for n in range(5):
        (tmp_path / f"class{n}").mkdir()
        for i in range(4):
            (tmp_path / f"class{n}" / f"{i}.jpg").write_bytes(b"x" * 10)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.jpg").write_text("")
    found = count("folder", tmp_path)
    assert (found.rows, found.picture_bytes, found.is_exact, found.source) == (20, 10, True, "listed")
    (tmp_path / "notes.txt").unlink()
    monkeypatch.setattr(counting, "_LIST_S", -1)
    found = count("folder", tmp_path)
    assert (found.rows, found.is_exact, found.source) == (20, False, "about: 1 of 5 entries listed")
    monkeypatch.setattr(counting, "_FIRST_ENTRY_S", -1)
    found = count("folder", tmp_path)
    assert (found.rows, found.source) == (1, "at least: listed until time ran out")


def test_links_of_a_folder_are_counted_as_they_are_read(tmp_path):
    (tmp_path / "set/cat").mkdir(parents=True)
    for name in ("set/1.jpg", "set/cat/2.jpg"):
        (tmp_path / name).write_bytes(b"x" * 10)
    for name, target in (("a", "."), ("b", "."), ("c", "."), ("cat/up", ".."), ("dog", "cat"), ("x.jpg", "gone")):
        (tmp_path / "set" / name).symlink_to(target)
    found = count("folder", tmp_path / "set")
    assert (found.rows, found.picture_bytes, found.source) == (3, 10, "listed")
    assert found.rows == len(source_files(SourceConfig(kind="folder", location=str(tmp_path / "set"))))


def test_folders_without_pictures_take_no_longer(tmp_path, monkeypatch):
    (tmp_path / "a/deep/deeper").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(counting, "_FIRST_ENTRY_S", -1)
    found = count("folder", tmp_path)
    assert (found.rows, found.source) == (0, "at least: listed until time ran out")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"^sources\.web\.location: .* holds no picture; "):
        count("folder", tmp_path)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_members_of_tars_are_counted(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as tar:
        for n in range(7):
            for name, size in ((f"{n}.jpg", 100), (f"{n}.json", 20)):
                info = tarfile.TarInfo(name)
                info.size = size
                tar.addfile(info, io.BytesIO(b"x" * size))
    found = count("tar", path)
    assert (found.rows, found.picture_bytes, found.is_exact) == (7, 100, True)


def test_a_tar_whose_headers_lead_nowhere_is_one_line(tmp_path):
    info = tarfile.TarInfo("x.jpg")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    nested = (info.tobuf(tarfile.GNU_FORMAT) + b"name\0" + bytes(507)) * 3000
    info.type, info.size = tarfile.REGTYPE, -512
    for stored in (nested, info.tobuf(tarfile.GNU_FORMAT)):
        (tmp_path / "a.tar").write_bytes(stored + bytes(1024))
        with pytest.raises(ConfigError, match=r"^sources\.web\.location: .*a\.tar' is no tar: .") as caught:
            count("tar", tmp_path / "a.tar")
        assert "\n" not in str(caught.value)


def test_archives_are_told_by_their_first_pages(tmp_path):
    page = b"<html><body>" + b"".join(b'<img src="/p/%d.jpg" alt="a">' % n for n in range(3)) + b"</body></html>"
    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page)
    record = (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.test/\r\nWARC-Date: 2026-01-01T00:00:00Z\r\n"
        b"WARC-Record-ID: <urn:uuid:1>\r\nContent-Type: application/http; msgtype=response\r\n"
        b"Content-Length: %d\r\n\r\n%s\r\n\r\n" % (len(body), body)
    )
    path = tmp_path / "a.warc"
    path.write_bytes(record * 4)
    assert count("archive", path).rows == 12


def test_what_is_not_there_has_the_rows_that_are_expected(tmp_path):
    found = count("list", tmp_path / "a.csv", expected_rows=1_300_000_000)
    assert (found.rows, found.is_exact) == (1_300_000_000, False)
    assert count("folder", "s3://bucket/pictures", expected_rows=5).rows == 5
    (tmp_path / "a.csv").write_text("url\nhttp://a.test/1\n")
    assert count("list", tmp_path / "a.csv", expected_rows=1_300_000_000).rows == 1  # it is there


@pytest.mark.parametrize(
    ("kind", "location", "message"),
    [
        ("list", "nowhere.csv", r"^sources\.web\.location: .* does not exist; .*; or say how many rows .*_rows=N$"),
        ("folder", "nowhere", r"^sources\.web\.location: .* does not exist; .*: sources\.web\.expected_rows=N$"),
        ("tar", "broken.tar", r"^sources\.web\.location: .* is no tar: "),
        ("parquet", "broken.parquet", r"^sources\.web\.location: .* is no parquet file: "),
        ("list", "s3://bucket/a.csv", r"^sources\.web\.location: .* in a bucket, and an estimate asks no network; or"),
        ("pages", "https://a.test/", r"^sources\.web\.location: .* is to be crawled, and an estimate asks no network"),
    ],
)
def test_what_nobody_knows_is_one_line(tmp_path, kind, location, message):
    (tmp_path / "broken.tar").write_bytes(b"x" * 700)
    (tmp_path / "broken.parquet").write_bytes(b"x" * 700)
    with pytest.raises(ConfigError, match=message) as caught:
        count(kind, location if "://" in location else tmp_path / location)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_sorted", [False, True])
def test_the_share_of_the_largest_host_is_told_from_all_over_a_list(tmp_path, is_sorted):
    """A third of the addresses are of one host, wherever they stand."""
    lines = [f"http://{'big' if n % 3 == 0 else f'h{n}'}.test/{n:07d}/{'x' * 40}.jpg\n" for n in range(120_000)]
    (tmp_path / "a.txt").write_text("".join(sorted(lines) if is_sorted else lines))
    assert count("list", tmp_path / "a.txt").busiest == pytest.approx(1 / 3, abs=0.03)


def test_a_packed_list_does_not_tell_its_largest_host(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"http://a.test/1\n" * 9))
    assert count("list", tmp_path / "a.txt.gz").busiest == 0


@pytest.mark.parametrize(
    ("values", "rows", "of_host"),
    [
        ({"depth": 0}, 4, 2),
        ({"depth": 3, "max_pages": 10_000, "max_pages_per_host": 500}, 10_000, 500),
        ({"depth": 3, "max_pages": 100, "max_pages_per_host": 1_000}, 100, 50),
    ],
)
def test_a_crawl_is_as_large_as_it_may_be(tmp_path, values, rows, of_host):
    """Two of the four pages that it begins with are of one host."""
    (tmp_path / "a.txt").write_text("http://a.test/1\nhttp://a.test/2\nhttp://b.test/\nhttp://c.test/\n")
    found = count_crawl(SourceConfig(kind="pages", location=str(tmp_path / "a.txt"), **values))
    assert (found.rows, found.rows * found.busiest) == (rows, of_host)
    one = count_crawl(SourceConfig(kind="pages", location="http://a.test/", depth=1, max_pages=20))
    assert (one.rows, one.busiest) == (20, 1.0)


def test_of_packed_parquet_one_file_is_looked_at(tmp_path):
    for n in range(3):
        with gzip.open(tmp_path / f"{n}.parquet.gz", "wb") as file:
            pq.write_table(pa.table({"url": [address(k) for k in range(1000)]}), file)
    found = count("list", tmp_path)
    assert (found.rows, found.source) == (3000, "about: parquet metadata of 1 of 3 files")
