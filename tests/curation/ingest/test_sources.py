import csv
import gzip
import hashlib
import io
import itertools
import json
import random
import tarfile
import tempfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.ingest import csvs, lists
from curation.ingest.address import canonical_url
from curation.ingest.local import TOO_LARGE, read_local
from curation.ingest.sources import SourceConfig, check_source, read_lines
from curation.store import LocalStore
from training.config import ConfigError
from training.data import files as data_files

GOOD = "http://a.test/1.jpg"


def rows_of(location, kind="list", **values):
    return [line.row for line in lines_of(location, kind, **values)]


def lines_of(location, kind="list", **values):
    return list(read_lines(SourceConfig(location=str(location), kind=kind, **values)))


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".zst": zstd}


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


@pytest.mark.parametrize(
    ("suffix", "packed"),
    [
        *itertools.product([".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet"], ["", ".gz", ".zst"]),
    ],
)
def test_lists_in_all_formats_say_the_same(tmp_path, suffix, packed):
    values = [
        {"url": GOOD, "page_url": "http://a.test/", "alt_text": 'a, "b"\nc', "label": "cat"},
        {"url": "http://b.test/ü.jpg", "page_url": "", "alt_text": "", "label": ""},
        {"url": "", "page_url": "", "alt_text": "x", "label": ""},
    ]
    path = tmp_path / f"list{suffix}{packed}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(values), tmp_path / "plain")
        path.write_bytes(PACK.get(packed, bytes)((tmp_path / "plain").read_bytes()))
    else:
        text = io.StringIO(newline="")
        if "csv" in suffix or "tsv" in suffix:
            writer = csv.DictWriter(text, list(values[0]), delimiter="\t" if "tsv" in suffix else ",")
            writer.writeheader()
            writer.writerows(values)
        elif suffix == ".json":
            json.dump(values, text, indent=1)
        else:
            text.write("".join(json.dumps(value) + "\n" for value in values))
        path.write_bytes(PACK.get(packed, bytes)(text.getvalue().encode()))
    rows = rows_of(path)
    assert rows[0] == (GOOD, None, "http://a.test/", 'a, "b"\nc', "cat", None, None)
    assert rows[1] == ("http://b.test/ü.jpg", None, None, None, None, None, None)
    assert rows[2].error == "empty line"
    check_source("sources.x", SourceConfig(location=str(path), kind="list"))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_packed_parquet_that_is_damaged_and_what_it_leaves_on_the_disk(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "list").mkdir()
    pq.write_table(pa.table({"url": [GOOD] * 10_000}), tmp_path / "plain")
    path = tmp_path / f"list/a.PARQUET{packed}"
    path.write_bytes(PACK[packed]((tmp_path / "plain").read_bytes()))
    assert [row.url for row in rows_of(tmp_path / "list")] == [GOOD] * 10_000
    for data, why in (
        (path.read_bytes()[:-20], "cannot be unpacked: ."),
        (PACK[packed](b"PAR1, and no more"), "is no parquet file: ."),
        (b"no pack", "cannot be unpacked: ."),
    ):
        path.write_bytes(data)
        for read in (rows_of, lambda path: check_source("x", SourceConfig(location=str(path), kind="list"))):
            with pytest.raises(ConfigError, match=why) as caught:
                read(path)
            assert "\n" not in str(caught.value)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_packed_parquet_of_pictures_is_none(tmp_path):
    """Its pictures are asked for by their place, one after the other, so it would be unpacked again and again."""
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "plain")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    with pytest.raises(ConfigError, match="is no parquet file"):
        rows_of(tmp_path / "a.parquet.gz", "parquet")


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


def a_list_of_captions(num, delimiter, captions):
    """Address and caption by line, as a program writes them that knows no quotes."""
    texts = (captions.get(n, f"caption {n}") for n in range(num))
    return "".join(f"http://a.test/{n}.jpg{delimiter}{text}\n" for n, text in enumerate(texts))


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
@pytest.mark.parametrize(
    "captions",
    [
        {3000: '"a stray quote'},  # csv gives up a cell of 131,072 letters in the middle of a line
        {19_500: '"closed by nothing'},
        {50: '"a stray quote', 60: '"another'},
        {50: '"a stray quote', 60: 'a plank of 5"', 61: '"', 19_999: '"the last'},
        {50: '"a stray quote', 51: 'a plank of 5"', 52: 'says "hi"', 53: '""', 54: '"'},
    ],
)
def test_a_quote_that_is_not_closed_takes_no_other_line(tmp_path, suffix, delimiter, captions):
    path = tmp_path / f"a{suffix}"
    path.write_text(f"url{delimiter}alt_text\n" + a_list_of_captions(20_000, delimiter, captions))
    lines = lines_of(path)
    assert [(line.file_line, line.row.url, line.row.error) for line in lines] == [
        (n + 2, f"http://a.test/{n}.jpg", None) for n in range(20_000)
    ]
    stray = {n: text for n, text in captions.items() if text != '""'}
    assert {n: lines[n].row.alt_text for n in stray} == stray


def test_a_cell_of_many_lines_beside_a_stray_quote(tmp_path):
    text = 'alt_text,url\n"two\nlines",http://a.test/1\n"""a"" cat, "http://a.test/2,\nb,http://a.test/3\n'
    path = tmp_path / "a.csv"
    path.write_text(text + '"a, b,http://x/\n' + "y\n" * 2000 + '",http://a.test/4\nc,http://a.test/5\n')
    rows = [(line.file_line, *line.row[:1], *line.row[3:6:2]) for line in lines_of(path)]
    assert rows[:4] == [
        (2, "http://a.test/1", "two\nlines", None),
        (4, None, '"a" cat, http://a.test/2', "empty line"),
        (5, "http://a.test/3", "b", None),
        (6, None, None, "not csv: a quote that is not closed"),
    ]
    assert [row[0] for row in rows] == [2, *range(4, 2009)]
    assert rows[-2:] == [(2007, "http://a.test/4", '"', None), (2008, "http://a.test/5", "c", None)]


def test_an_address_in_quotes_takes_no_other(tmp_path):
    (tmp_path / "a.csv").write_text('url,alt_text\n"http://a.test/1,x\nhttp://a.test/2,y\nhttp://a.test/3",z\n')
    lines = lines_of(tmp_path / "a.csv")
    assert [(line.file_line, line.row.url) for line in lines][1] == (3, "http://a.test/2")
    assert [line.file_line for line in lines] == [2, 3, 4]


def test_a_header_with_a_stray_quote_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('"url,alt_text\n' + a_list_of_captions(20_000, ",", {}))
    with pytest.raises(ConfigError, match=r"has no column 'url'; its columns: \"url, alt_text$"):
        rows_of(tmp_path / "a.csv")


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_packed_lists_of_several_pieces_and_cut_off(tmp_path, packed):
    lines = [f"http://a.test/{n}.jpg\n" for n in range(20_000)]
    halves = ["".join(lines[:7]), "".join(lines[7:])]
    data = b"".join(PACK[packed](half.encode()) for half in halves)  # as `cat a.gz b.gz` makes it
    (tmp_path / f"a.txt{packed}").write_bytes(data)
    assert [row.url for row in rows_of(tmp_path / f"a.txt{packed}")] == [line.strip() for line in lines]
    (tmp_path / f"a.txt{packed}").write_bytes(data[:-20])
    with pytest.raises(ConfigError, match=rf"^location '.*a\.txt{packed}' cannot be read to its end: .") as caught:
        rows_of(tmp_path / f"a.txt{packed}")
    assert "\n" not in str(caught.value)


def test_a_json_array_holds_objects_and_addresses(tmp_path, monkeypatch):
    values = [{"url": GOOD, "label": 3}, GOOD, "ü", 7, None, [GOOD], {"link": GOOD}, {"url": "x" * 500}, -12.5e3, ""]
    for piece in (1, 3, 1000):
        monkeypatch.setattr(lists, "_PIECE", piece)
        for indent in (None, 2):
            (tmp_path / "a.json").write_text(" \n" + json.dumps(values, indent=indent) + "\n")
            lines = lines_of(tmp_path / "a.json")
            assert [line.file_line for line in lines] == list(range(1, 11))
            assert [(line.row.url, line.row.label) for line in lines][:2] == [(GOOD, "3"), (GOOD, None)]
            errors = [line.row.error for line in lines]
            assert errors == [None, None, "no scheme", *["empty line"] * 4, "no scheme", *["empty line"] * 2]
    (tmp_path / "a.json").write_text("[ ]")
    assert rows_of(tmp_path / "a.json") == []


def test_an_element_that_is_nested_too_deep_is_a_row(tmp_path, monkeypatch):
    odd = json.dumps('[{"\\')  # brackets and quotes in a string are none
    deep = [
        "[" * 50_000 + odd + "]" * 50_000,
        f'{{"url": "{GOOD}", "x": ' + f'{{"]": {odd}, "y": ' * 50_000 + "1" + "}" * 50_000 + " } ",
    ]
    for piece in (997, lists._PIECE):
        monkeypatch.setattr(lists, "_PIECE", piece)
        (tmp_path / "a.json").write_text(f'["{GOOD}", {deep[0]}, {deep[1]}, "{GOOD}", {deep[0]} ]')
        rows = [(line.file_line, line.row.url, line.row.error) for line in lines_of(tmp_path / "a.json")]
        bad = (None, "not json")
        assert rows == [(1, GOOD, None), (2, *bad), (3, *bad), (4, GOOD, None), (5, *bad)]
    for text in (f"[{deep[0][:-1]}", f"[{deep[0]} {deep[0]}]", '["' + "[" * 50_000):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ConfigError, match="damaged or cut off"):
            rows_of(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_number_that_python_does_not_read_loses_no_row(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(lists, "_PIECE", 1000)  # it goes on in the next
    digits = "7" * 5000
    elements = [f'{{"url": "{GOOD}", "width": {digits}}}', f'{{"url": {digits}}}', f'{{"url": "{GOOD}", "label": -5}}']
    text = "[" + ", ".join([*elements, digits]) + "]" if suffix == ".json" else "\n".join([*elements, digits])
    (tmp_path / f"a{suffix}").write_text(text)
    rows = rows_of(tmp_path / f"a{suffix}")
    assert [(row.url, row.label) for row in rows[:3]] == [(GOOD, None), (digits, None), (GOOD, "-5")]
    assert [row.error for row in rows] == [None, "no scheme", None, "no scheme" if suffix == ".json" else "empty line"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"url": "x"}', "damaged or cut off"),
        ('[{"url": "x"}, {"ur', "damaged or cut off"),
        ('["a" "b"]', "neither , nor ] behind an element"),
        ('["a",]', "damaged or cut off, Expecting value"),
        ("[" * 100_000, "damaged or cut off"),
        ("", r"is no array; a \.json list is an array"),
        ('{"url": ["x"]}', r"is an object; a \.json list is an array"),
    ],
)
def test_json_that_is_damaged_or_of_another_shape(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        rows_of(tmp_path / "a.json")
    assert "a.json" in str(caught.value)


def test_every_row_tells_its_file_and_where_it_stands_in_it(tmp_path):
    (tmp_path / "l/deep").mkdir(parents=True)
    (tmp_path / "l/b.csv").write_text(f'url,alt_text\n{GOOD},"two\nlines"\n{GOOD},x\n')
    (tmp_path / "l/a.txt").write_text(f"{GOOD}\n\n{GOOD}\n")
    (tmp_path / "l/deep/c.jsonl").write_text(f'\n{{"url": "{GOOD}"}}\n')
    pq.write_table(pa.table({"url": [GOOD] * 2}), tmp_path / "l/d.parquet")
    (tmp_path / "l/.hidden.txt").write_text(GOOD)
    (tmp_path / "l/.hidden").mkdir()
    (tmp_path / "l/.hidden/e.txt").write_text(GOOD)
    (tmp_path / "l/README.md").write_text("no list")
    expected = [("a.txt", 1), ("a.txt", 2), ("a.txt", 3), ("b.csv", 2), ("b.csv", 4)]
    expected += [("d.parquet", 1), ("d.parquet", 2), ("deep/c.jsonl", 1), ("deep/c.jsonl", 2)]
    assert [(line.file, line.file_line) for line in lines_of(tmp_path / "l")] == expected
    assert [(line.file, line.file_line) for line in lines_of(tmp_path / "l/[ab].*")] == expected[:5]
    assert [(line.file, line.file_line) for line in lines_of(tmp_path / "l/a.txt")] == expected[:3]


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


def test_links_are_followed_and_no_loop(tmp_path, make_picture):
    """Three links to their own folder would be 3 ** 40 folders, which is where the system ends it."""
    for name in ("set/cat/1.jpg", "set/.hidden/2.jpg", "outside/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(make_picture())
    for name, target in (("a", "."), ("b", "."), ("c", "."), ("dog", "cat"), ("far", "../outside"), ("x.jpg", "gone")):
        (tmp_path / "set" / name).symlink_to(target)
    (tmp_path / "set/self.jpg").symlink_to("self.jpg")
    (tmp_path / "set/4.jpg").symlink_to("cat/1.jpg")
    (tmp_path / "set/cat/up").symlink_to("..")
    (tmp_path / "outside/back").symlink_to("../set")
    expected = ["4.jpg", "cat/1.jpg", "dog/1.jpg", "far/3.jpg"]
    assert [row.location for row in rows_of(tmp_path / "set", "folder")] == expected
    for name in expected:  # the same below a pattern
        (tmp_path / "set" / name).with_suffix(".txt").write_text(GOOD)
    files = [line.file for line in lines_of(tmp_path / "set/**/*.txt")]
    assert files == [name.replace(".jpg", ".txt") for name in expected]


def test_folders_that_link_to_each_other_by_ever_more_ways_are_named(tmp_path, make_picture):
    for name in "abcdefgh":
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.jpg").write_bytes(make_picture())
        for other in "abcdefgh".replace(name, ""):
            (tmp_path / "set" / name / other).symlink_to(f"../{other}")
    with pytest.raises(ConfigError, match="links lead into this folder by more than 100 ways"):
        rows_of(tmp_path / "set", "folder")


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


def test_a_line_without_an_end_is_a_row_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "_MAX_LINE_BYTES", 40)
    error = "a line of more than 40 bytes"
    for end in (b"", b"\n"):
        for length in (41, 80, 81, 1000):
            lines = [GOOD.encode(), b"x" * length, GOOD.encode(), b"x" * length + end]
            (tmp_path / "a.txt").write_bytes(b"\n".join(lines))
            found = [(line.file_line, line.row.error) for line in lines_of(tmp_path / "a.txt")]
            assert found == [(1, None), (2, error), (3, None), (4, error)]
    (tmp_path / "a.jsonl").write_text(f'{{"url": "{GOOD}"}}\n{{"url": "{GOOD}", "alt_text": "long"}}\n' * 2)
    assert [row.error for row in rows_of(tmp_path / "a.jsonl")] == [None, error] * 2


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_of_csv_without_an_end_is_a_row_too(tmp_path, monkeypatch, end):
    for module in (lists, csvs):
        monkeypatch.setattr(module, "MAX_LINE", 100)
    monkeypatch.setattr(csvs, "_TOO_LONG", "too long")
    long = "not csv: too long"
    for length in (*range(101, 104), *range(199, 205), *range(300, 305), 1000):
        for start in ("", "http://a.test/x.jpg,", '"'):  # the quote that it leaves open takes no other line
            line = (start + "x" * length)[: max(length, 101)]
            (tmp_path / "a.csv").write_text(end.join(["url,text", f"{GOOD},a", line, f"{GOOD},b", line]), newline="")
            found = [(line.file_line, line.row.error) for line in lines_of(tmp_path / "a.csv")]
            assert found == [(2, None), (3, long), (4, None), (5, long)], (length, start)
    (tmp_path / "a.csv").write_text("x" * 1000)
    with pytest.raises(ConfigError, match=r"a\.csv' is no csv file: too long"):
        rows_of(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_a_packed_line_without_an_end_takes_no_memory(tmp_path, suffix):
    with gzip.open(tmp_path / f"a.{suffix}.gz", "wb", compresslevel=1) as file:
        file.write(b"url\n" if suffix == "csv" else b"")
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(f"\n{GOOD}\n".encode())
    tracemalloc.start()
    try:
        errors = [row.error for row in rows_of(tmp_path / f"a.{suffix}.gz")]
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    said = {"txt": "a line of more than 16,777,216 bytes", "csv": "not csv: field larger than field limit (131072)"}
    assert errors == [said[suffix], None]


def sparse_member(name, num_bytes):
    """A header of GNU's for a file of which nothing is stored but its size."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (num_bytes, 0)
    header[483:495] = b"%011o\0" % num_bytes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_too_large_is_not_read(tmp_path, packed):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"first"), ("2.jpg", bytes(50 << 20)), ("3.jpg", b"x" * 100)])
    whole = (tmp_path / "a.tar").read_bytes()
    stated = tarfile.TarInfo("far.jpg")
    stated.size = 100 << 30
    stored = sparse_member("sparse.jpg", 2 << 30) + whole.rstrip(b"\0") + bytes(412) + stated.tobuf()
    (tmp_path / "a.tar").write_bytes(gzip.compress(stored, 1) if packed else stored)
    (tmp_path / "f").mkdir()
    for name, num_bytes in (("2.jpg", 50 << 20), ("3.jpg", 100)):
        with (tmp_path / "f" / name).open("wb") as file:
            file.truncate(num_bytes)
    tracemalloc.start()
    try:
        places = ["sparse.jpg", "1.jpg", "2.jpg", "3.jpg", "far.jpg", "gone.jpg"]
        found = list(read_local("tar", str(tmp_path / "a.tar"), places, max_bytes=100))
        assert found == [TOO_LARGE, b"first", TOO_LARGE, b"x" * 100, TOO_LARGE, None]
        found = list(read_local("folder", str(tmp_path / "f"), ["2.jpg", "3.jpg"], max_bytes=100))
        assert found == [TOO_LARGE, bytes(100)]
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def texts_of(values, kind):
    """An array of bytes that claims to hold text."""
    stored = pa.array(values, pa.binary())
    if pa.types.is_dictionary(kind):
        return texts_of(values, kind.value_type).dictionary_encode()
    return stored.cast(pa.large_binary()).view(kind) if pa.types.is_large_string(kind) else stored.view(kind)


KINDS = [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_cell_of_parquet_that_is_no_text_is_a_row(tmp_path, kind):
    urls = [GOOD.encode(), b"http://a.test/\xff", "http://a.test/ü".encode(), None]
    table = pa.table({"url": texts_of(urls, kind), "label": [1, 2, 3, 4], "alt_text": texts_of([b"\xff"] * 4, kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [(row.url, row.alt_text, row.label, row.error) for row in rows_of(tmp_path / "a.parquet")] == [
        (GOOD, "\ufffd", "1", None),
        ("http://a.test/\ufffd", "\ufffd", "2", "not utf-8"),
        ("http://a.test/ü", "\ufffd", "3", None),
        (None, "\ufffd", "4", "empty line"),
    ]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_picture_of_parquet_with_a_text_that_is_none_stays(tmp_path, kind):
    texts = texts_of([b"cat", b"d\xffg", None], kind)
    pq.write_table(pa.table({"image": [b"1", b"2", b"3"], "label": texts, "url": texts}), tmp_path / "a.parquet")
    assert [(row.url, row.label, row.error) for row in rows_of(tmp_path / "a.parquet", "parquet")] == [
        ("cat", "cat", None),
        ("d\ufffdg", "d\ufffdg", None),
        (None, None, None),
    ]


@pytest.mark.parametrize("manifest", [b"b.jpg," + b"x" * 200_000, b"b.jpg," + b"x\nb.jpg," * 3_000_000])
def test_a_manifest_that_cannot_be_read_gives_no_labels(tmp_path, manifest):
    write_tar(tmp_path / "set.tar", [("b.jpg", b"B"), ("manifest.csv", b"file,label\nb.jpg,bee\n" + manifest)])
    assert [(row.location, row.label, row.error) for row in rows_of(tmp_path / "set.tar", "tar")] == [
        ("b.jpg", None, None)
    ]


def test_a_tar_whose_headers_lead_nowhere_after_registration(tmp_path):
    info = tarfile.TarInfo("x.jpg")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    nested = (info.tobuf(tarfile.GNU_FORMAT) + b"name\0" + bytes(507)) * 3000
    info.type, info.size = tarfile.REGTYPE, -512
    for stored in (nested, info.tobuf(tarfile.GNU_FORMAT)):
        write_tar(tmp_path / "a.tar", [("1.jpg", b"first")])
        whole = (tmp_path / "a.tar").read_bytes()
        (tmp_path / "a.tar").write_bytes(whole[:1024] + stored + whole[1024:])
        assert list(read_local("tar", str(tmp_path / "a.tar"), ["1.jpg", "x.jpg"])) == [b"first", None]


@pytest.mark.parametrize("mode", ["gz", "xz", "bz2"])
def test_a_packed_tar_that_is_damaged_after_registration(tmp_path, mode):
    noise = random.Random(1).randbytes(200_000)
    write_tar(tmp_path / "a.tar", [("1.jpg", b"first"), ("2.jpg", noise), ("3.jpg", b"last")], f"w:{mode}")
    places = [row.location for row in rows_of(tmp_path / "a.tar", "tar")]
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[-1000:] = b"\xff" * 1000
    (tmp_path / "a.tar").write_bytes(data)
    found = list(read_local("tar", str(tmp_path / "a.tar"), places))
    assert len(found) == 3
    assert found[2] is None
    with pytest.raises(ConfigError, match="give a tar that is whole"):
        rows_of(tmp_path / "a.tar", "tar")


@pytest.mark.parametrize("pattern", ["*.tar", ""])
def test_several_tars_name_their_file(tmp_path, pattern):
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t" / "2.tar", [("a.jpg", b"2")])
    write_tar(tmp_path / "t" / "1.tar", [("a.jpg", b"1")])
    location = str(tmp_path / "t" / pattern)
    places = [row.location for row in rows_of(location, "tar")]
    assert places == ["1.tar::a.jpg", "2.tar::a.jpg"]
    assert list(read_local("tar", location, [*places, "3.tar::a.jpg"])) == [b"1", b"2", None]


def test_what_lies_beside_a_picture_in_a_tar(tmp_path):
    texts = {"url": GOOD, "page_url": "http://a.test/", "caption": "a cat", "label": 4}
    members = [
        ("s/0.json", json.dumps(texts).encode()),
        ("s/0.jpg", b"0"),
        ("s/0.txt", b"not this"),
        ("s/1.v2.left.png", b"1"),
        ("s/1.v2.right.PNG", b"1r"),
        ("s/1.txt", "\ufeff two words \n".encode()),
        ("s/1.cls", b"7\n"),
        ("s/2.jpg", b"2"),
        ("s/2.json", b"{"),
        ("s/3.jpg", b"3"),
        ("s/3.seg.json", b"{"),  # not of the picture, but of its segments
        ("s/4.json", b"[1]"),
        ("s/4.cls", b"\xff"),
        ("s/4.webp", b"4"),
        ("s/0.json", b'{"url": "http://far.test/"}'),  # not beside it
        ("5.jpg", b"5"),
        ("5.json", b'{"url": ["x"], "caption": "", "label": 0, "page_url": "\\ud800"}'),
    ]
    write_tar(tmp_path / "set.tar", members)
    lines = lines_of(tmp_path / "set.tar", "tar", alt_text_column="caption")
    assert [(line.file_line, line.row[:6]) for line in lines] == [
        (2, (GOOD, "s/0.jpg", "http://a.test/", "a cat", "4", None)),
        (4, (None, "s/1.v2.left.png", None, "two words", "7", None)),
        (5, (None, "s/1.v2.right.PNG", None, "two words", "7", None)),
        (8, (None, "s/2.jpg", None, None, "s", "its .json is not json")),
        (10, (None, "s/3.jpg", None, None, "s", None)),
        (14, (None, "s/4.webp", None, None, "\ufffd", None)),
        (16, (None, "5.jpg", "?", None, "0", None)),
    ]


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


def test_a_damaged_group_of_parquet_loses_its_own_pictures(tmp_path):
    images = [bytes([n]) * 5000 for n in range(6)]
    table = pa.table({"image": pa.array(images, pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2, compression="zstd", use_dictionary=False)
    places = [row.location for row in rows_of(tmp_path / "a.parquet", "parquet")]
    chunk = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = (
        b"\xff" * chunk.total_compressed_size
    )
    (tmp_path / "a.parquet").write_bytes(data)
    expected = [*images[:2], None, None, *images[4:]]
    assert list(read_local("parquet", str(tmp_path / "a.parquet"), places)) == expected


def test_a_bucket_that_fails_in_the_middle_of_parquet_is_no_damage(tmp_path, in_a_bucket, monkeypatch):
    images = [bytes([n]) * 500_000 for n in range(4)]
    (tmp_path / "local").mkdir()
    table = pa.table({"image": pa.array(images, pa.binary())})
    pq.write_table(table, tmp_path / "local/a.parquet", row_group_size=2, compression="none", use_dictionary=False)
    location = f"{in_a_bucket(LocalStore(str(tmp_path / 'local'))).location}/a.parquet"
    places = [row.location for row in rows_of(location, "parquet")]
    found = read_local("parquet", location, places)
    assert [next(found), next(found)] == images[:2]
    monkeypatch.setattr(data_files, "read_range", _gone)
    with pytest.raises(OSError, match="the bucket is gone"):
        next(found)


def _gone(path, offset, num_bytes):
    raise OSError("the bucket is gone")


def test_a_folder_of_parquet_as_hugging_face_has_it(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [
        {"bytes": b"one", "path": "1.jpg"},
        {"bytes": None, "path": "data/2.jpg"},
        {"bytes": b"three", "path": None},
    ]
    (tmp_path / "set/data").mkdir(parents=True)
    for name, rows in (("train-00000", values), ("train-00001", values[::2]), (".cache", values)):
        table = pa.table({"picture": pa.array(rows, kind), "label": pa.array(["a", "b", "c"][: len(rows)])})
        pq.write_table(table, tmp_path / f"set/data/{name}.parquet", row_group_size=2)
    (tmp_path / "set/README.md").write_text("card")
    location = str(tmp_path / "set")
    lines = lines_of(location, "parquet")
    assert [(line.file, line.file_line, line.row.label) for line in lines] == [
        *(("data/train-00000.parquet", n, label) for n, label in ((1, "a"), (2, "b"), (3, "c"))),
        *(("data/train-00001.parquet", n, label) for n, label in ((1, "a"), (2, "b"))),
    ]
    assert [line.row.error for line in lines] == [
        None, "the file holds no bytes of it, only its path 'data/2.jpg'", None, None, None,
    ]  # fmt: skip
    places = [line.row.location for line in lines]
    assert places[3] == "data/train-00001.parquet::picture/0"
    assert list(read_local("parquet", location, places)) == [b"one", None, b"three", b"one", b"three"]
    check_source("sources.x", SourceConfig(location=location, kind="parquet"))


@pytest.mark.parametrize(
    ("columns", "named", "found"),
    [
        ({"image": "bytes"}, None, "image"),
        ({"image": "nested", "mask": "nested"}, None, "image"),
        ({"image": "text", "jpg": "nested"}, None, "jpg"),
        ({"image": "bytes", "mask": "nested"}, "mask", "mask"),
        ({"left": "nested", "right": "nested"}, None, r"several columns of pictures; name one of \['left', 'right'\]"),
        ({"image": "text"}, None, r"'image' of '.*' is string; it must hold bytes"),
        ({"jpg": "bytes"}, None, r"has no column 'image'; its columns: jpg"),
        ({"jpg": "bytes"}, "png", r"has no column 'png'; its columns: jpg"),
    ],
)
def test_which_column_holds_pictures(tmp_path, columns, named, found):
    values = {"bytes": [b"x"], "text": ["x"], "nested": [{"bytes": b"x"}]}
    pq.write_table(pa.table({name: values[kind] for name, kind in columns.items()}), tmp_path / "a.parquet")
    config = SourceConfig(location=str(tmp_path / "a.parquet"), kind="parquet", image_column=named)
    if found in columns:
        check_source("sources.x", config)
        assert [line.row.location for line in read_lines(config)] == [f"{found}/0"]
    else:
        with pytest.raises(ConfigError, match=rf"^sources\.x\.image_column: .*{found}"):
            check_source("sources.x", config)


def a_bit_of_everything(folder):
    """Small sources of every kind but archives, below a folder."""
    files = {
        "l/a.txt": b"\xef\xbb\xbfhttp://a.test/1.jpg\n\nno address\nhttp://a.test/\xff\n",
        "l/b.csv": b'url,alt_text,label\nhttp://a.test/2,"a\nb",c\n\xff,\xff\nhttp://a.test/3\n',
        "l/c.jsonl.gz": gzip.compress(
            b'{"url": "http://a.test/4", "page_url": 7}\n[1]\n\n{"url": "\\ud800"}\n"http://a.test/5"\n'
        ),
        **{f"f/{n}": n.encode() for n in ("top.png", "cat/2.PNG", "cat/deep/1.jpg", "a.b/x.gif", "a/y.gif", "n.txt")},
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    pq.write_table(pa.table({"url": ["http://a.test/6", None], "label": [1, 2]}), folder / "l/d.parquet")
    manifest = ("manifest.csv", b"file,label\nx.jpg,bee\n")
    for name in ("t/b.tar", "t/a/c.tar", "t/a.b/d.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(folder / name, [manifest, ("x.jpg", b"1"), ("y/z.png", b"22"), ("x.jpg", b"333"), ("notes.md", b"")])
    image = pa.array([{"bytes": b"one"}, None, {"bytes": b"three"}], pa.struct([("bytes", pa.binary())]))
    (folder / "p").mkdir()
    pq.write_table(pa.table({"image": image, "url": ["u", None, "w"]}), folder / "p/x.parquet", row_group_size=2)


@pytest.mark.parametrize(
    ("location", "kind", "digest"),
    [
        ("l/a.txt", "list", "14809b860c8eda21ce049a86bd5c490ef8ea2c5bc0e6c34cc3fea016dd976d58"),
        ("l/b.csv", "list", "a96cef88cd44ed9b99c36e037435f9c464bddca8289f537348e4b49bc3d804ba"),
        ("l/c.jsonl.gz", "list", "c28f0227079f0773a8ee4d12a876c08a86128dbf6331fa4f6230a35c184912c0"),
        ("l/d.parquet", "list", "fe9f8bba987c051ac8aabb2aa5800b16e4dd7ef42a75d2e46f291319de9aec1f"),
        ("l/[ab].*", "list", "4e26654a646fbb126711956131528b24a09e0da7d439f179fce1bc7c9fb5b164"),
        ("f", "folder", "31d7c8a2afd21ae4a920a95422b34c2341da8438041919ad4464528ddd375853"),
        ("t/b.tar", "tar", "bcf3d328390d6f24a1fcd6761b2248a870d4d8ba8349be3632a15a753c1931ec"),
        ("t/**/*.tar", "tar", "70daa1353ffe75f8aed7d279167fb3ba9adb992f600d05da970f59d0cbcc915a"),
    ],
)
def test_what_was_registered_is_known_again(tmp_path, location, kind, digest):
    """Digests of rows as they were before rows told their file: a pool of then goes on."""
    a_bit_of_everything(tmp_path)
    rows = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows_of(tmp_path / location, kind))
    assert hashlib.sha256(rows.encode()).hexdigest() == digest


def test_sources_in_a_bucket_are_those_of_a_folder(tmp_path, in_a_bucket):
    a_bit_of_everything(tmp_path / "local")
    bucket = in_a_bucket(LocalStore(str(tmp_path / "local"))).location
    for location, kind in (
        *(("l/a.txt", "list"), ("l/b.csv", "list"), ("l/c.jsonl.gz", "list"), ("l/d.parquet", "list")),
        *(("l", "list"), ("l/[ab].*", "list"), ("f", "folder"), ("f/", "folder"), ("t", "tar"), ("t/b.tar", "tar")),
        *(
            ("t/*/*.tar", "tar"),
            ("t/**/*.tar", "tar"),
            ("p/x.parquet", "parquet"),
            ("*/x.parquet", "parquet"),
            ("p", "parquet"),
        ),
    ):
        here, there = (lines_of(f"{base}/{location}", kind) for base in (tmp_path / "local", bucket))
        assert here == there, location
        assert here
        check_source("sources.x", SourceConfig(location=f"{bucket}/{location}", kind=kind))
        if kind != "list":
            places = [line.row.location for line in here]
            found = list(read_local(kind, f"{bucket}/{location}", [*places, places[0].replace("x", "gone")]))
            assert found[:-1] == list(read_local(kind, str(tmp_path / "local" / location), places)), location
            if kind != "parquet":
                assert TOO_LARGE in read_local(kind, f"{bucket}/{location}", places, max_bytes=1)
    for location, kind, message in (
        ("l/none.txt", "list", r"sources\.x\.location: 's3://.*none\.txt' does not exist; give a file or a glob"),
        ("f/top.png", "folder", r"is a file; kind 'folder' takes a folder"),
        ("l", "folder", r"does not exist; kind 'folder' takes a folder of pictures"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_source("sources.x", SourceConfig(location=f"{bucket}/{location}", kind=kind))


def test_a_bucket_that_is_not_there(tmp_path, in_a_bucket):
    (tmp_path / "local").mkdir()
    in_a_bucket(LocalStore(str(tmp_path / "local")))
    with pytest.raises(ConfigError, match=r"sources\.x\.location: 's3://no-such-bucket/a\.txt' ") as caught:
        check_source("sources.x", SourceConfig(location="s3://no-such-bucket/a.txt", kind="list"))
    assert "\n" not in str(caught.value)


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
        ("{}/a.doc", "list", r"a list ends in one of \.txt.*, each also in \.gz and \.zst$"),
        ("{}/a.csv", "list", r"sources\.x\.url_column: '.*a\.csv' has no column 'url'; its columns: link, text"),
        ("{}/twice.csv", "list", r"sources\.x\.alt_text_column: '.*e\.csv' has 2 columns 'alt_text'; .* once: url$"),
        ("{}/twice.parquet", "list", r"sources\.x\.url_column: '.*' has 2 columns 'url'; .* once: label$"),
        ("{}/a.csv", "parquet", r"is no parquet file"),
        ("{}/a.json", "list", r"is an object; a \.json list is an array of objects or of addresses"),
        ("gs://bucket/a.csv", "list", r"scheme 'gs' is not known; give a path or s3://bucket/key"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_in_one_line(tmp_path, location, kind, message):
    (tmp_path / "a.csv").write_text("link,text\n")
    (tmp_path / "twice.csv").write_text("url,alt_text,other,alt_text,other\n")
    pq.write_table(pa.table([[GOOD], ["a"], [GOOD]], names=["url", "label", "url"]), tmp_path / "twice.parquet")
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


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    (tmp_path / "a[1].txt").write_text(GOOD)
    (tmp_path / "a1.txt").write_text("http://other.test/")
    assert [(line.file, line.row.url) for line in lines_of(tmp_path / "a[1].txt")] == [("a[1].txt", GOOD)]
