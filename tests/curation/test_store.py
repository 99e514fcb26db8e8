import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.lease import Lease, LeaseLostError, LeaseTakenError, check_lease, lease_holder
from curation.schema import Part
from curation.store import LocalStore, open_store, read_footer, read_part, write_part
from training.config import ConfigError

TABLE = pa.table({"image_id": pa.array(range(1000), pa.int64()), "name": [f"x{i % 7}" for i in range(1000)]})


def written(folder: Path, table: pa.Table, **more: str):
    path = folder / "part"
    footer = write_part(table, path, stage="s", version=1, fingerprint=more.get("fingerprint", "f"), inputs={"a": 1})
    return path, footer


def test_the_digest_follows_the_rows_and_nothing_else(tmp_path):
    _, whole = written(tmp_path, TABLE)
    chunked = pa.concat_tables([TABLE.slice(0, 10), TABLE.slice(10)])
    _, same = written(tmp_path, chunked, fingerprint="another")
    _, other = written(tmp_path, TABLE.slice(1))
    changed = TABLE.set_column(1, "name", pa.array([*TABLE["name"].to_pylist()[:-1], "zz"]))
    _, last_row = written(tmp_path, changed)
    _, renamed = written(tmp_path, TABLE.rename_columns(["image_id", "title"]))
    assert same.digest == whole.digest
    assert len({whole.digest, other.digest, last_row.digest, renamed.digest}) == 4


def test_a_part_is_the_same_bytes_every_time(tmp_path):
    first, _ = written(tmp_path, TABLE)
    before = first.read_bytes()
    second, _ = written(tmp_path, pa.concat_tables([TABLE.slice(0, 400), TABLE.slice(400)]))
    assert second.read_bytes() == before


def test_a_part_is_created_once_and_comes_back_whole(tmp_path):
    store = LocalStore(str(tmp_path / "root"))
    part = Part("run", "t", 3)
    path, footer = written(tmp_path, TABLE)
    assert read_footer(store, part) is None
    assert store.create(part.path, path)
    assert read_footer(store, part) == footer
    assert read_part(store, part).equals(TABLE)
    assert read_part(store, part, ["name"]).column_names == ["name"]
    _, again = written(tmp_path, read_part(store, part), fingerprint="another")
    assert again.digest == footer.digest
    path, _ = written(tmp_path, TABLE.slice(1))
    assert not store.create(part.path, path)
    assert read_part(store, part).num_rows == 1000
    assert list(store.list("t")) == ["t/part-000000003.parquet"]
    assert not list((tmp_path / "root" / ".beside").iterdir())


def test_a_part_is_replaced_only_when_it_is_the_one_that_was_read(tmp_path):
    store = LocalStore(str(tmp_path / "root"))
    store.create("a", written(tmp_path, TABLE)[0])
    tag = store.tag("a")
    assert store.replace("a", written(tmp_path, TABLE.slice(1))[0], tag)
    assert not store.replace("a", written(tmp_path, TABLE.slice(2))[0], tag)


def test_when_an_object_was_written(tmp_path):
    store = LocalStore(str(tmp_path))
    (tmp_path / "a").write_text("a")
    os.utime(tmp_path / "a", (86_400, 86_400))
    assert store.modified("a") == datetime(1970, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_large_object_is_stored_once_under_its_name(tmp_path, in_a_bucket, where):
    local = LocalStore(str(tmp_path / "pool"))
    store = local if where == "disk" else in_a_bucket(local)
    data = bytes(range(256)) * 150_000  # three parts
    for size in (len(data), 100, len(data)):
        for _ in range(2):
            file = tmp_path / "file"
            file.write_bytes(data[:size])
            store.create_named(f"bytes/{size}.tar", file)
            assert not file.exists()
            assert store.read(f"bytes/{size}.tar") == data[:size]
    assert list(store.list("bytes")) == ["bytes/100.tar", f"bytes/{len(data)}.tar"]


def test_what_a_killed_writer_left_is_swept(tmp_path):
    store = LocalStore(str(tmp_path))
    (tmp_path / ".beside").mkdir()
    (tmp_path / ".beside" / "half").write_bytes(b"PAR1")
    store.sweep()
    assert not list((tmp_path / ".beside").iterdir())


def test_a_parquet_file_of_others_is_one_readable_line(tmp_path):
    import pyarrow.parquet as pq

    (tmp_path / "t").mkdir()
    pq.write_table(TABLE, tmp_path / "t" / "part-000000000.parquet")
    with pytest.raises(ConfigError, match="not written by lvd"):
        read_footer(LocalStore(str(tmp_path)), Part("run", "t", 0))


def test_an_unknown_root_names_what_is_allowed():
    with pytest.raises(ConfigError, match=r"scheme 'gs' is not known; give a folder or s3://"):
        open_store("gs://bucket/x")


def test_one_driver_at_a_time(tmp_path):
    store = LocalStore(str(tmp_path))
    lease = Lease(store, tmp_path)
    assert lease_holder(store) == f"process {os.getpid()} on {socket.gethostname()}"
    check_lease(store, lease.token)
    with pytest.raises(LeaseTakenError, match=f"process {os.getpid()}"):
        Lease(store, tmp_path)
    with pytest.raises(LeaseLostError):
        check_lease(store, "another")
    lease.release()
    assert lease_holder(store) is None


def test_workers_of_a_dead_driver_write_nothing_more(tmp_path):
    note = {"token": "t", "host": socket.gethostname(), "pid": 2**22 + 1, "started": 1.0, "time": 9e9}
    (tmp_path / "lease.json").write_text(json.dumps(note))
    with pytest.raises(LeaseLostError, match="the driver is gone; its workers stop"):
        check_lease(LocalStore(str(tmp_path)), "t")


def test_a_dead_driver_is_followed_at_once_and_a_silent_one_after_a_while(tmp_path):
    store = LocalStore(str(tmp_path))
    note = {"token": "t", "host": socket.gethostname(), "pid": 2**22 + 1, "started": 1.0, "time": 9e9}
    (tmp_path / "lease.json").write_text(json.dumps(note))
    Lease(store, tmp_path).release()
    (tmp_path / "lease.json").write_text(json.dumps({**note, "host": "elsewhere", "time": 0.0}))
    Lease(store, tmp_path).release()
    (tmp_path / "lease.json").write_text(json.dumps({**note, "host": "elsewhere"}))
    with pytest.raises(LeaseTakenError, match="on elsewhere"):
        Lease(store, tmp_path)


def sorted_part(store, folder: Path) -> tuple[Part, pa.Table]:
    table = pa.table(
        {"image_id": pa.array(range(0, 400_000, 2), pa.int64()), "name": ["x" * (n % 5) for n in range(200_000)]}
    )
    path, _ = written(folder, table)
    store.create("t/part-000000000.parquet", path)
    return Part("run", "t", 0), table


@pytest.mark.parametrize("within", [(0, 10), (131_070, 131_080), (399_990, 10**9), (5, 6), (-5, 0), (0, 10**9)])
def test_a_range_is_the_rows_of_the_part_that_lie_in_it(tmp_path, within):
    store = LocalStore(str(tmp_path / "root"))
    part, table = sorted_part(store, tmp_path)
    ids = table["image_id"].to_numpy()
    inside = table.filter(pa.array((ids >= within[0]) & (ids < within[1])))
    assert read_part(store, part, within=("image_id", *within)).equals(inside)
    assert read_part(store, part, ["name"], within=("image_id", *within)).equals(inside.select(["name"]))


def test_a_range_of_an_object_asks_for_little_of_it(tmp_path):
    store = Remote(str(tmp_path / "root"))
    part, table = sorted_part(store, tmp_path)
    assert read_part(store, part, ["name"], within=("image_id", 10, 30)).equals(table.slice(5, 10).select(["name"]))
    assert sum(store.asked) < store.size(part.path) / 2


class Remote:
    """A store that is no folder to whoever reads it, and counts the bytes that it is asked for."""

    def __init__(self, location: str) -> None:
        self._store = LocalStore(location)
        self.asked: list[int] = []

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read_range(self, path, offset, size):
        self.asked.append(size)
        return self._store.read_range(path, offset, size)


def test_a_range_reads_only_the_row_groups_that_may_hold_it(tmp_path, monkeypatch):
    store = LocalStore(str(tmp_path / "root"))
    part, _ = sorted_part(store, tmp_path)
    read = []
    real = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda s, g, **k: read.extend(g) or real(s, g, **k))
    read_part(store, part, within=("image_id", 131_071, 131_073))
    assert read == [1]
