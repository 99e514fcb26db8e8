import csv
import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.ingest.address import canonical_url
from curation.ingest.local import read_local
from curation.ingest.sources import SourceConfig, check_source, read_lines
from training.config import ConfigError

GOOD = "http://a.test/1.jpg"


def rows_of(location, kind="list", **values):
    return [line.row for line in read_lines(SourceConfig(location=str(location), kind=kind, **values))]


def test_txt_with_broken_lines(tmp_path):
    path = tmp_path / "list.txt"
    lines = [GOOD, "", "no address", "http://", "http:///x.jpg", "http://[::1/x", "http://a.test:port/x"]
    data = "\n".join(lines).encode() + b"\nhttp://a.test/\x07.jpg\nhttp://a.test/\xff.jpg\nftp://a.test/x\ndata:,x\n"
    path.write_bytes(data)
    rows = rows_of(path)
    errors = [row.error for row in rows]
    assert [error is None for error in errors] == [True, *[False] * 8, True, True]
    assert errors[1:4] == ["empty line", "no scheme", "no host"]
    assert (errors[7], errors[8]) == ("control character", "not utf-8")
    assert rows[0] == (GOOD, None, None, None, None, None, None)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".jsonl.gz"])
def test_lists_in_all_formats_say_the_same(tmp_path, suffix):
    values = [
        {"url": GOOD, "page_url": "http://a.test/", "alt_text": 'a, "b"\nc', "label": "cat"},
        {"url": "http://b.test/ü.jpg", "page_url": "", "alt_text": "", "label": ""},
        {"url": "", "page_url": "", "alt_text": "x", "label": ""},
    ]
    path = tmp_path / f"list{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), path)
    else:
        text = io.StringIO(newline="")
        if "csv" in suffix or "tsv" in suffix:
            writer = csv.DictWriter(text, list(values[0]), delimiter="\t" if "tsv" in suffix else ",")
            writer.writeheader()
            writer.writerows(values)
        else:
            text.write("".join(json.dumps(value) + "\n" for value in values))
        data = text.getvalue().encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    rows = rows_of(path)
    assert rows[0] == (GOOD, None, "http://a.test/", 'a, "b"\nc', "cat", None, None)
    assert rows[1] == ("http://b.test/ü.jpg", None, None, None, None, None, None)
    assert rows[2].error == "empty line"
    check_source("sources.x", SourceConfig(location=str(path), kind="list"))


def test_csv_and_jsonl_that_are_damaged_inside(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbfurl,alt_text\nhttp://a.test/\xff.jpg,x\nhttp://a.test/1.jpg,\xff\nhttp://a.test/2.jpg\n"
    )
    rows = rows_of(tmp_path / "a.csv")
    assert [row.error for row in rows] == ["not utf-8", None, None]
    assert rows[1].alt_text == "\ufffd"
    (tmp_path / "a.jsonl").write_bytes(
        b'{"url": "http://a.test/1"}\n{"url"\n[1]\n\n\xff\n{"url": "http://a.test/\\ud800"}\n{"url": 7}\n'
    )
    errors = [row.error for row in rows_of(tmp_path / "a.jsonl")]
    assert errors == [None, "not json", "empty line", "empty line", "not utf-8", "not utf-8", "no scheme"]


def test_a_byte_order_mark_loses_no_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(f'\ufeff{{"url": "{GOOD}"}}\n\ufeff{{"url": "{GOOD}"}}\n'.encode())
    assert [(row.url, row.error) for row in rows_of(path)] == [(GOOD, None), (None, "not json")]


def test_a_glob_is_read_in_sorted_order(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"http://a.test/{name}\n")
    assert [row.url for row in rows_of(tmp_path / "*.txt")] == ["http://a.test/a.txt", "http://a.test/b.txt"]


def test_folder(tmp_path, make_picture):
    for name in ("top.png", "cat/2.PNG", "cat/1.jpg", "dog/deep/3.webp", "cat/notes.txt", ".hidden.png"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_picture())
    rows = rows_of(tmp_path / "set", "folder")
    assert [(row.location, row.label) for row in rows] == [
        ("cat/1.jpg", "cat"),
        ("cat/2.PNG", "cat"),
        ("dog/deep/3.webp", "dog"),
        ("top.png", None),
    ]
    assert list(read_local("folder", str(tmp_path / "set"), ["top.png", "gone.png"])) == [make_picture(), None]


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_with_labels(tmp_path, mode):
    manifest = b"file,class_name\nb.jpg,bee\n"
    members = [("b.jpg", b"B"), ("x/a.png", b"A"), ("manifest.csv", manifest), ("b.json", b"{}"), ("b.jpg", b"B2")]
    write_tar(tmp_path / "set.tar", members, mode)
    rows = rows_of(tmp_path / "set.tar", "tar")
    assert [(row.location, row.label, row.error) for row in rows] == [
        ("b.jpg", "bee", None),
        ("x/a.png", "x", None),
        ("b.jpg", "bee", "stands twice in the archive"),
    ]
    places = [*(row.location for row in rows if row.error is None), "gone.jpg"]
    assert list(read_local("tar", str(tmp_path / "set.tar"), places)) == [b"B", b"A", None]
    for place, data in zip(places, [b"B", b"A", None], strict=True):  # whatever else is asked for
        assert list(read_local("tar", str(tmp_path / "set.tar"), [place])) == [data]


def test_several_tars_name_their_file(tmp_path):
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t" / "2.tar", [("a.jpg", b"2")])
    write_tar(tmp_path / "t" / "1.tar", [("a.jpg", b"1")])
    location = str(tmp_path / "t" / "*.tar")
    places = [row.location for row in rows_of(location, "tar")]
    assert places == ["1.tar::a.jpg", "2.tar::a.jpg"]
    assert list(read_local("tar", location, [*places, "3.tar::a.jpg"])) == [b"1", b"2", None]


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_of_pictures(tmp_path, nested):
    images = [b"one", b"two", None, b"four"]
    column = [None if data is None else {"bytes": data, "path": "x"} for data in images] if nested else images
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if nested else pa.binary()
    table = pa.table({"image": pa.array(column, kind), "label": pa.array([3, 1, 2, 0])})
    pq.write_table(table, tmp_path / "set.parquet", row_group_size=2)
    rows = rows_of(tmp_path / "set.parquet", "parquet")
    assert [(row.location, row.label) for row in rows] == [(f"image/{n}", str(n_)) for n, n_ in enumerate([3, 1, 2, 0])]
    places = [*(row.location for row in rows), "image/9"]
    assert list(read_local("parquet", str(tmp_path / "set.parquet"), places)) == [*images, None]


@pytest.mark.parametrize(
    ("location", "kind", "message"),
    [
        ("{}/none.txt", "list", r"sources\.x\.location: '.*none\.txt' does not exist; give a file or a glob"),
        ("{}/empty", "list", r"is a folder without a file for kind 'list': \.txt, \.csv"),
        ("{}/empty", "folder", r"holds no picture; kind 'folder' takes a folder of pictures"),
        ("{}/*", "folder", r"does not exist; kind 'folder' takes a folder"),
        ("{}/a.csv", "archive", r"an archive ends in one of \.warc, \.warc\.gz, \.arc"),
        ("{}/a.csv", "folder", r"is a file; kind 'folder' takes a folder"),
        ("{}/none", "folder", r"does not exist; kind 'folder' takes a folder"),
        ("{}/a.doc", "list", r"a list ends in one of \.txt"),
        ("{}/a.csv", "list", r"sources\.x\.url_column: '.*a\.csv' has no column 'url'; its columns: link, text"),
        ("{}/a.csv", "parquet", r"is no parquet file"),
        ("{}/a.json", "list", r"is an object; a \.json list is an array of objects or of addresses"),
        ("gs://bucket/a.csv", "list", r"scheme 'gs' is not known; give a path or s3://bucket/key"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_in_one_line(tmp_path, location, kind, message):
    (tmp_path / "a.csv").write_text("link,text\n")
    (tmp_path / "a.doc").write_text("")
    (tmp_path / "a.json").write_text('\n {"url": "http://a.test/1.jpg"}')
    (tmp_path / "empty").mkdir()
    config = SourceConfig(location=location.format(tmp_path), kind=kind)
    with pytest.raises(ConfigError, match=message) as caught:
        check_source("sources.x", config)
    assert "\n" not in str(caught.value)


def test_a_tar_that_is_none(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar at all")
    with pytest.raises(ConfigError, match="give a tar that is whole"):
        rows_of(tmp_path / "x.tar", "tar")


@pytest.mark.parametrize(
    "same",
    [
        (
            "http://a.test/x",
            "HTTP://A.Test:80/x#top",
            "http://a.test./x",
            " http://a.test/x ",
            "http://a.test/./y/../x",
        ),
        ("https://a.test/", "https://a.test:443", "https://a.test"),
        ("http://a.test/%7Euser/%C3%BC", "http://a.test/~user/ü", "http://a.test/~user/%c3%bc"),
        ("http://xn--mnchen-3ya.test/x", "http://MÜNCHEN.test/x"),
    ],
)
def test_spellings_of_one_address(same):
    assert len({canonical_url(url) for url in same}) == 1


def test_addresses_that_differ():
    urls = ["http://a.test/x", "https://a.test/x", "http://a.test:8080/x", "http://a.test/x?", "http://a.test/x?a=1"]
    urls += ["http://a.test/X", "http://a.test/x/", "http://a.test/%2Fx", "http://a.test/x?b=1&a=1"]
    assert len({canonical_url(url) for url in urls}) == len(urls)
