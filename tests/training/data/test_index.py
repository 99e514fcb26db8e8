"""Parts of every kind as shards and rows, what is refused, and how a changed set is told."""

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.config import ConfigError, DataConfig, PartConfig
from training.data.index import Index
from training.data.sources import open_source, pictures
from training.data.tars import TarWriter


def jpeg(number: int, side_px: int = 24) -> bytes:
    """A picture of one colour that tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", (side_px, side_px), (number % 256, 255 - number % 256, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> TarWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TarWriter(path)
    for name, data in files:
        writer.add(name, data)
    writer.close()
    return writer


def write_run(root: Path, tars: list[list[tuple[str, int]]]) -> Path:
    """Tables and tars as `lvd curate` leaves them; a picture is (query set that chose it, number)."""
    listed, position = [], 0
    for number, rows in enumerate(tars):
        path, manifest, files = f"tars/{number:09d}.tar", [], []
        for part, picture in rows:
            data, key = jpeg(picture), f"{position:09d}"
            files += [(f"{key}.jpg", data), (f"{key}.json", json.dumps({"part": part}).encode())]
            manifest.append({"key": key, "part": part, "label": f"class {picture % 3}", "tar": path, "size": len(data)})
            position += 1
        writer = write_tar(root / path, files)
        with tarfile.open(root / path) as tar:
            offsets = [info.offset_data for info in tar if info.name.endswith(".jpg")]
        table = pa.Table.from_pylist([{**row, "offset": o} for row, o in zip(manifest, offsets, strict=True)])
        (root / "manifest").mkdir(exist_ok=True)
        pq.write_table(table, root / f"manifest/part-{number:09d}.parquet")
        row = {"tar": path, "num_samples": len(rows), "num_bytes": writer.num_bytes, "sha256": writer.sha256}
        listed.append(row)
    (root / "shards").mkdir()
    pq.write_table(pa.Table.from_pylist(listed), root / "shards/part-000000000.parquet")
    return root


def read_all(part: PartConfig, **options: object) -> dict[str, list[tuple[str, bytes]]]:
    found = {}
    for name, source in open_source(part, **options).items():
        for shard in source.shards:
            rows = source.rows(shard)
            assert len(rows.keys) == shard.num_samples
            found.setdefault(name, []).extend((key, rows.read(row)) for row, key in enumerate(rows.keys))
    return found


def tars_part(location: object, **more: object) -> PartConfig:
    return PartConfig(kind="tars", location=str(location), **more)


def index_of(**parts: PartConfig) -> Index:
    return Index.open(DataConfig(parts=parts))


# Tars


def test_the_first_picture_of_each_key_of_a_tar_is_its_sample(tmp_path: Path):
    files = [
        ("readme.txt", b"no picture"),
        ("a/one.json", b'{"label": 4}'),
        ("a/one.jpg", jpeg(1)),
        ("a/one.png", b"a second picture"),
        ("two.seg.PNG", jpeg(2)),
        ("three.txt", b"caption only"),
        ("._four.jpg", b"what macOS leaves"),
        ("five.WebP", jpeg(5)),
    ]
    write_tar(tmp_path / "deep/x.tar", files)
    write_tar(tmp_path / "y.tar", [("a/one.jpg", jpeg(6))])
    wanted = [("deep/x.tar/a/one", jpeg(1)), ("deep/x.tar/two", jpeg(2)), ("deep/x.tar/five", jpeg(5))]
    wanted.append(("y.tar/a/one", jpeg(6)))
    assert read_all(tars_part(tmp_path)) == {"": wanted}
    assert read_all(tars_part(f"{tmp_path}/**/*.tar")) == {"": wanted}
    assert read_all(tars_part(f"{tmp_path}/?.tar")) == {"": wanted[3:]}


def test_samples_are_those_that_webdataset_reads(tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    names = ["a/b.c/d.jpg", "a/b.c/d.cls", "x.y.jpg", "x.z.png", "e.f.jpg", "e.json", "d.jpg", "a/b.c/d.jpeg"]
    write_tar(tmp_path / "a.tar", [(name, jpeg(n)) for n, name in enumerate(names)])
    theirs = []
    for sample in webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False):
        first = next(data for ext, data in sample.items() if ext.split(".")[-1] in ("jpg", "png", "jpeg"))
        theirs.append((f"a.tar/{sample['__key__']}", first))
    assert read_all(tars_part(tmp_path / "a.tar"))[""] == theirs


def test_a_tar_without_pictures_is_noted_and_an_error_only_where_there_is_nothing_else(tmp_path: Path):
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ConfigError, match=r"no picture in it; .*empty\.tar: no picture"):
        index_of(a=tars_part(tmp_path))
    write_tar(tmp_path / "full.tar", [("a.jpg", jpeg(1))])
    index = index_of(a=tars_part(tmp_path))
    assert index.num_samples == 1
    assert index.notes == [f"data.parts.a: {tmp_path}/empty.tar: no picture in it, left out"]


@pytest.mark.parametrize("num_bytes", [0, 100, 700, 1500, 2100])
def test_a_cut_off_tar_is_refused_with_its_name_and_where_it_ends(tmp_path: Path, num_bytes: int):
    path = tmp_path / "a.tar"
    write_tar(path, [("a.jpg", jpeg(1)), ("b.jpg", jpeg(2))])
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ConfigError, match=rf"a\.tar.*byte {num_bytes:,}$"):
        index_of(a=tars_part(tmp_path))


def test_a_compressed_tar_is_refused(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
    with pytest.raises(ConfigError, match=r"a\.tar: compressed tars cannot be read by offset"):
        index_of(a=tars_part(tmp_path))


def test_what_a_scan_found_is_kept_until_the_tar_changes(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(1)), ("a.json", b"{}")])
    cache = tmp_path / "cache"
    first = read_all(tars_part(tmp_path), cache=cache)
    (kept,) = cache.iterdir()
    stamp = kept.stat().st_mtime_ns
    assert read_all(tars_part(tmp_path), cache=cache) == first
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [stamp]
    write_tar(tmp_path / "a.tar", [("b.jpg", jpeg(2)), ("a.json", b"{}")])
    assert read_all(tars_part(tmp_path), cache=cache) == {"": [("a.tar/b", jpeg(2))]}


# Folders and parquet


def test_a_folder_is_read_at_any_depth_in_the_order_of_names(tmp_path: Path):
    for name in ("b/2.JPG", "a/x/1.png", "3.jpeg", "b/notes.txt", ".hidden/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    wanted = ["3.jpeg", "a/x/1.png", "b/2.JPG"]
    assert read_all(PartConfig(kind="folder", location=str(tmp_path))) == {"": [(n, n.encode()) for n in wanted]}


def test_parquet_holds_bytes_or_structs_and_a_split_is_chosen(tmp_path: Path):
    rows = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in range(10)]
    splits = ["train" if n % 3 else "val" for n in range(10)]
    table = pa.table({"image": pa.array(rows), "plain": [row["bytes"] for row in rows], "split": splits})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    part = PartConfig(kind="parquet", location=str(tmp_path))
    found = read_all(part)[""]
    assert found == [(f"a.parquet#{n // 4}/{n % 4}", jpeg(n)) for n in range(10)]
    assert read_all(part.model_copy(update={"column": "plain"}))[""] == found
    assert read_all(part.model_copy(update={"where": "val"}))[""] == [found[n] for n in (0, 3, 6, 9)]
    for changes, message in (
        ({"column": "img"}, "no column 'img'; it has: image, plain, split"),
        ({"column": "split"}, "column 'split' is string; it must be bytes"),
        ({"where": "test"}, "no picture in it; no row has the split 'test'"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(part.model_copy(update=changes))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"a\.parquet: no parquet, damaged or cut off"):
        open_source(part)


@pytest.mark.parametrize("kind", ["tars", "folder", "parquet"])
def test_a_part_that_is_not_there_is_an_error(tmp_path: Path, kind: str):
    for location in (tmp_path / "none", tmp_path, f"{tmp_path}/*.x"):
        with pytest.raises(ConfigError, match="no such file"):
            open_source(PartConfig(kind=kind, location=str(location)))
    with pytest.raises(ConfigError, match="scheme 'gs' is not known"):
        open_source(PartConfig(kind=kind, location="gs://x/y"))


# Runs

RUN = [[("web", 0), ("flowers", 1), ("web", 2)], [("web", 3)], [("flowers", 4), ("web", 5)]]


def test_a_run_is_read_whole_or_by_its_parts(tmp_path: Path):
    part = PartConfig(kind="run", location=str(write_run(tmp_path, RUN)))
    assert read_all(part) == {"": [(f"{n:09d}", jpeg(n)) for n in range(6)]}
    assert read_all(part.model_copy(update={"split_by_part": True})) == {
        "flowers": [(f"{n:09d}", jpeg(n)) for n in (1, 4)],
        "web": [(f"{n:09d}", jpeg(n)) for n in (0, 2, 3, 5)],
    }
    index = index_of(lvd=part.model_copy(update={"split_by_part": True}))
    assert [(p.name, p.num_samples, float(p.share)) for p in index.parts] == [
        ("lvd.flowers", 2, pytest.approx(1 / 3)),
        ("lvd.web", 4, pytest.approx(2 / 3)),
    ]
    assert index.verify() == []


def weigh(root: Path, text: str) -> None:
    (root / "recipe.yaml").write_text(text)


def shares_by_part(part: PartConfig) -> dict[str, float]:
    return {found.name: float(found.share) for found in index_of(lvd=part).parts}


def test_parts_of_a_run_have_the_weights_of_its_own_recipe(tmp_path: Path):
    part = PartConfig(kind="run", location=str(write_run(tmp_path, RUN)), split_by_part=True)
    by_number = {"lvd.flowers": pytest.approx(1 / 3), "lvd.web": pytest.approx(2 / 3)}
    assert shares_by_part(part) == by_number
    weigh(tmp_path, "name: x\nqueries:\n  flowers: {mode: as_is, weight: 0.75}\n  web: {}\n  empty: {weight: 0.2}\n")
    assert shares_by_part(part) == {"lvd.flowers": 0.75, "lvd.web": 0.25}
    weigh(tmp_path, "queries: {flowers: {weight: 1}, web: {weight: 3}}\n")
    assert shares_by_part(part) == {"lvd.flowers": 0.25, "lvd.web": 0.75}
    assert shares_by_part(part.model_copy(update={"split_by_part": False})) == {"lvd": 1}
    assert shares_by_part(part.model_copy(update={"part_weights": {}})) == by_number
    assert shares_by_part(part.model_copy(update={"part_weights": {"web": 0.5}})) == {
        "lvd.flowers": 0.5,
        "lvd.web": 0.5,
    }
    weigh(tmp_path, "queries: {}\n")
    assert shares_by_part(part) == by_number


def test_weights_of_parts_that_cannot_be_used_are_refused(tmp_path: Path):
    part = PartConfig(kind="run", location=str(write_run(tmp_path, RUN)), split_by_part=True)
    for text in ("- a list\n", "queries: {web: 3}\n", "queries: {web: {weight: much}}\n", "{", "queries: [web]\n"):
        weigh(tmp_path, text)
        with pytest.raises(ConfigError, match=r"recipe\.yaml: is no recipe of `lvd curate`"):
            index_of(lvd=part)
    weigh(tmp_path, "queries: {web: {weight: 1.5}}\n")
    with pytest.raises(
        ConfigError, match=r"data\.parts\.lvd\.part_weights: weights add up to 1\.5 and 'flowers' has none"
    ):
        index_of(lvd=part)
    with pytest.raises(ConfigError, match="part_weights names 'dogs'; it has: flowers, web"):
        index_of(lvd=part.model_copy(update={"part_weights": {"dogs": 1.0}}))
    with pytest.raises(ConfigError, match="set `split_by_part` too"):
        index_of(lvd=part.model_copy(update={"part_weights": {"web": 1.0}, "split_by_part": False}))


def test_weights_that_changed_behind_a_training_run_are_refused(tmp_path: Path):
    part = PartConfig(kind="run", location=str(write_run(tmp_path, RUN)), split_by_part=True)
    before = index_of(lvd=part)
    index_of(lvd=part).check_same(before.summary(), before.shares())
    weigh(tmp_path, "queries: {flowers: {weight: 0.5}}\n")
    index_of(lvd=part).check_same(before.summary())  # a checkpoint that does not say
    with pytest.raises(
        ConfigError, match=r"part 'lvd\.flowers' is 0\.5 of all samples, and the run began with 0\.3333"
    ):
        index_of(lvd=part).check_same(before.summary(), before.shares())


def test_a_run_whose_files_are_not_those_it_lists_is_refused(tmp_path: Path):
    root = write_run(tmp_path / "run", RUN)
    part = PartConfig(kind="run", location=str(root))
    tar, manifest = root / "tars/000000001.tar", root / "manifest/part-000000001.parquet"
    whole, rows = tar.read_bytes(), manifest.read_bytes()
    tar.write_bytes(whole + b"\0")
    with pytest.raises(ConfigError, match=r"000000001\.tar: 10,241 bytes, the run lists 10,240"):
        open_source(part)
    tar.unlink()
    with pytest.raises(ConfigError, match=r"000000001\.tar: missing"):
        open_source(part)
    tar.write_bytes(whole)
    manifest.write_bytes((root / "manifest/part-000000000.parquet").read_bytes())
    with pytest.raises(ConfigError, match=r"part-000000001\.parquet: 3 rows, the run lists 1 picture"):
        open_source(part)
    manifest.unlink()
    with pytest.raises(ConfigError, match=r"part-000000001\.parquet: missing"):
        open_source(part)
    manifest.write_bytes(rows)
    tar.write_bytes(whole[:600] + b"?" + whole[601:])
    (problem,) = index_of(lvd=part).verify()
    assert problem.startswith(f"part 'lvd': {tar}: sha256 is {hashlib.sha256(tar.read_bytes()).hexdigest()}, the run")
    with pytest.raises(ConfigError, match="no table `shards` in it: no run of `lvd curate`"):
        open_source(PartConfig(kind="run", location=str(tmp_path)))


def test_the_run_made_here_has_the_columns_that_curation_writes(tmp_path: Path):
    from curation.schema import TABLES

    manifest, shards = TABLES["manifest"].schema.names, TABLES["shards"].schema.names
    root = write_run(tmp_path, RUN)
    assert set(pq.read_schema(root / "shards/part-000000000.parquet").names) == set(shards)
    assert set(pq.read_schema(root / "manifest/part-000000000.parquet").names) <= set(manifest)


# Identity


def test_the_digest_follows_content_and_not_place(tmp_path: Path):
    for place in ("here", "there"):
        write_tar(tmp_path / place / "a.tar", [("a.jpg", jpeg(1))])
    here, there = (index_of(x=tars_part(tmp_path / place)) for place in ("here", "there"))
    assert here.digest == there.digest
    assert here.difference(there.summary()) is None
    assert pickle.loads(pickle.dumps(here)).digest == here.digest
    assert json.loads(json.dumps(here.summary())) == here.summary()


def test_a_changed_set_is_refused_by_the_name_of_its_first_changed_shard(tmp_path: Path):
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", jpeg(1))])
    part = tars_part(tmp_path)
    before = index_of(x=part)
    write_tar(tmp_path / "b.tar", [("b.jpg", jpeg(1)), ("c.jpg", jpeg(2))])
    changed = index_of(x=part)
    assert changed.digest != before.digest
    assert changed.difference(before.summary()) == "part 'x': shard b.tar changed: pictures 2, was 1"
    write_tar(tmp_path / "aa.tar", [("b.jpg", jpeg(1))])
    assert index_of(x=part).difference(changed.summary()) == "part 'x': shard aa.tar was added"
    assert changed.difference(index_of(x=part).summary()) == "part 'x': shard aa.tar was removed"
    with pytest.raises(ConfigError, match=r"its order is lost: part 'x': shard aa\.tar was added; put it back"):
        index_of(x=part).check_same(before.summary())
    assert index_of(x=part, y=part).difference(before.summary()) == "part 'x': shard aa.tar was added"
    assert index_of(y=part).difference(before.summary()) == "part 'x' was removed"


def test_a_folder_with_another_file_is_another_set(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"one")
    (tmp_path / "b.jpg").write_bytes(b"two")
    part = PartConfig(kind="folder", location=str(tmp_path))
    before = index_of(x=part)
    (tmp_path / "b.jpg").rename(tmp_path / "c.jpg")
    assert "shard a.jpg changed: digest" in str(index_of(x=part).difference(before.summary()))


def test_weights_are_in_proportion_or_shares_of_one(tmp_path: Path):
    for name, count in (("a", 1), ("b", 3), ("c", 4)):
        write_tar(tmp_path / f"{name}.tar", [(f"{n}.jpg", jpeg(n)) for n in range(count)])

    def shares(a: float | None, b: float | None, c: float | None) -> list[float]:
        weights = {"a": a, "b": b, "c": c}
        index = index_of(**{name: tars_part(tmp_path / f"{name}.tar", weight=w) for name, w in weights.items()})
        assert sum(part.share for part in index.parts) == 1
        return [float(part.share) for part in index.parts]

    assert shares(None, None, None) == [1 / 8, 3 / 8, 4 / 8]
    assert shares(2, 1, 1) == [0.5, 0.25, 0.25]
    assert shares(0.5, None, None) == pytest.approx([0.5, 0.5 * 3 / 7, 0.5 * 4 / 7])
    with pytest.raises(ConfigError, match="weights add up to 1 and 'b' has none; give a weight to every part"):
        shares(1, None, None)


# Labels


def test_labels_of_every_kind(tmp_path: Path):
    write_tar(
        tmp_path / "a.tar",
        [(f"{n}.{ext}", jpeg(n) if ext == "jpg" else json.dumps({"c": n % 2}).encode()) for n in range(4)
         for ext in ("jpg", "json")],
    )  # fmt: skip
    found = list(pictures(tars_part(tmp_path / "a.tar"), "c"))
    assert found == [(f"a.tar/{n}", str(n % 2), jpeg(n)) for n in range(4)]
    with pytest.raises(ConfigError, match=r"a\.tar: the json of 'a\.tar/0' has no field 'x'; it has: c"):
        list(pictures(tars_part(tmp_path / "a.tar"), "x"))
    write_tar(tmp_path / "bare.tar", [("1.jpg", jpeg(1))])
    with pytest.raises(ConfigError, match=r"'bare\.tar/1' has no json"):
        list(pictures(tars_part(tmp_path / "bare.tar"), "c"))
    assert list(pictures(tars_part(tmp_path / "bare.tar"), None)) == [("bare.tar/1", None, jpeg(1))]

    run = PartConfig(kind="run", location=str(write_run(tmp_path / "run", RUN)), split_by_part=True)
    assert {key: label for key, label, _ in pictures(run, "label")} == {f"{n:09d}": f"class {n % 3}" for n in range(6)}
    with pytest.raises(ConfigError, match=r"no column 'class'; it has: key, part, label"):
        list(pictures(run, "class"))

    folder = PartConfig(kind="folder", location=str(tmp_path / "classes"))
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.jpg").write_bytes(name.encode())
    assert list(pictures(folder, "folder")) == [("cat/1.jpg", "cat", b"cat"), ("dog/1.jpg", "dog", b"dog")]
    with pytest.raises(ConfigError, match="label 'label' is not known of a folder; allowed: folder"):
        list(pictures(folder, "label"))

    table = pa.table({"image": [jpeg(n) for n in range(6)], "label": [0, 1, None, 0, 1, 2], "split": ["a", "b"] * 3})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    part = PartConfig(kind="parquet", location=str(tmp_path / "x.parquet"))
    assert [label for _, label, _ in pictures(part, "label")] == ["0", "1", "0", "1", "2"]
    chosen = part.model_copy(update={"where": "b"})
    assert [(key, label) for key, label, _ in pictures(chosen, "label")] == [
        ("x.parquet#0/1", "1"),
        ("x.parquet#0/3", "0"),
        ("x.parquet#1/1", "2"),
    ]


def test_the_pictures_drawn_for_evaluation_are_from_all_of_the_set_and_always_the_same(tmp_path: Path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{n:03d}.jpg", b"x") for n in range(100)])
    drawn = [key for key, _, _ in pictures(tars_part(tmp_path), None, max_rows=40)]
    assert drawn == [key for key, _, _ in pictures(tars_part(tmp_path), None, max_rows=40)]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 40
    assert 8 < sum(key.startswith("a") for key in drawn) < 32
    assert len(list(pictures(tars_part(tmp_path), None, max_rows=300))) == 200


# Buckets


def test_parts_in_a_bucket_are_those_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import urllib.request

    moto = pytest.importorskip("moto.server")
    import obstore
    from obstore.store import S3Store

    write_run(tmp_path / "set/run", RUN)
    write_tar(tmp_path / "set/tars/a.tar", [(f"{n}.jpg", jpeg(n)) for n in range(3)])
    write_tar(tmp_path / "set/tars/more/b.tar", [("x.jpg", np.random.default_rng(0).bytes(400_000))])
    (tmp_path / "set/classes/cat").mkdir(parents=True)
    (tmp_path / "set/classes/cat/1.jpg").write_bytes(jpeg(7))
    pq.write_table(pa.table({"image": [jpeg(1), jpeg(2)]}), tmp_path / "set/x.parquet")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        values = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}
        for name, value in {**values, "REGION": "us-east-1", "VIRTUAL_HOSTED_STYLE_REQUEST": "false"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/lvd", method="PUT")).close()
        client = S3Store("lvd", config={"allow_http": "true"})
        for path in (tmp_path / "set").rglob("*"):
            if path.is_file():
                obstore.put(client, str(path.relative_to(tmp_path)), path.read_bytes())
        for kind, place, label in (
            ("run", "set/run", "label"),
            ("tars", "set/tars", None),
            ("tars", "set/tars/*.tar", None),
            ("tars", "set/tars/**/*.tar", None),
            ("tars", "set/tars/a.tar", None),
            ("folder", "set/classes", "folder"),
            ("parquet", "set/x.parquet", None),
        ):
            local, bucket = (PartConfig(kind=kind, location=f"{root}/{place}") for root in (tmp_path, "s3://lvd"))
            assert list(pictures(bucket, label)) == list(pictures(local, label))
            assert index_of(x=bucket).digest == index_of(x=local).digest
        with pytest.raises(ConfigError, match="s3://lvd/none: no such file"):
            index_of(x=tars_part("s3://lvd/none"))
        with pytest.raises(ConfigError, match="no table `shards` in it"):
            index_of(x=PartConfig(kind="run", location="s3://lvd/none"))
    finally:
        server.stop()


# Real pictures


def test_real_parquet_and_tars_are_read(shared_data: Path):
    part = PartConfig(kind="parquet", location=str(shared_data / "tiny_imagenet_100c.parquet"), where="train")
    found = list(pictures(part, "label", max_rows=50))
    assert len(found) == 50
    assert all(Image.open(io.BytesIO(data)).size == (64, 64) for _, _, data in found)
    assert index_of(x=tars_part(shared_data / "pool_imagenet_300.tar")).num_samples == 300
