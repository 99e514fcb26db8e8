"""Originals with a face leave the pool, whatever kills the purge, and nothing else does."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from curation.export.objects import swap
from curation.lease import LeaseLostError
from curation.safety.originals import purge_originals
from curation.schema import TABLES, Part
from curation.store import LocalStore, read_footer, read_part, write_part
from training.data.tars import TarWriter

SHARD = 3_000_000
FOLDER, HASHES = "detections", "hashes"  # the small run has looked once, in folders without a key


def images(pool: Any) -> dict[int, dict[str, Any]]:
    return {row["image_id"]: row for row in read_part(pool, Part("pool", "images", SHARD)).to_pylist()}


def bytes_of(pool: Any, row: dict[str, Any]) -> bytes:
    return pool.read_range(row["object"], row["offset"], row["num_bytes"])


def holding(pool: Any, needle: bytes) -> list[str]:
    return [path for path in pool.list("") if needle in pool.read(path)]


def seen(pool: Any, **columns: Any) -> int:
    """Give the first picture of the shard that has a blurred version these values; its id."""
    part = Part("pool", FOLDER, SHARD)
    table = read_part(pool, part)
    with_face = [row["image_id"] for row in table.to_pylist() if row["blurred_object"] is not None]
    rows = [{**row, **(columns if row["image_id"] in with_face else {})} for row in table.to_pylist()]
    swap(pool, part, pa.Table.from_pylist(rows, schema=table.schema), Path(pool.path))
    return int(with_face[0])


FACE = {"label": "FACE", "score": 0.9, "x_px": 10.0, "y_px": 10.0, "w_px": 20.0, "h_px": 20.0}


@pytest.fixture
def pool(small_run: Any) -> LocalStore:
    return small_run.store("pool")


def test_what_shows_a_face_or_does_not_decode_goes_and_the_rest_stays(pool: Any, tmp_path: Path) -> None:
    face = seen(pool, faces=[FACE], num_faces=1)
    before = images(pool)
    broken = next(i for i, row in before.items() if row["object"] and i != face)
    hashes = read_part(pool, Part("pool", HASHES, SHARD))
    failed = pc.equal(hashes["image_id"], broken)
    at = hashes.schema.get_field_index("ok")
    swap(pool, Part("pool", HASHES, SHARD), hashes.set_column(at, "ok", pc.invert(failed)), tmp_path)
    needles = {i: bytes_of(pool, before[i]) for i in (face, broken)}
    (pool.path / f"bytes/{SHARD:09d}-{'0' * 16}.tar").write_bytes(needles[face])  # what a killed worker left
    footer = read_footer(pool, Part("pool", "images", SHARD))

    done = purge_originals(pool, [SHARD], FOLDER, tmp_path, lambda: None)
    # Lines that were fetched and that look was never asked for go too.
    assert (done.num_faces, done.num_elsewhere) == (1, 0)
    assert done.num_unseen >= 1
    assert [holding(pool, needle) for needle in needles.values()] == [[], []]
    after = images(pool)
    for image_id, row in after.items():
        kept = {name: value for name, value in row.items() if name not in ("object", "offset")}
        assert kept == {name: value for name, value in before[image_id].items() if name not in ("object", "offset")}
        if row["object"] is not None:
            assert hashlib.sha256(bytes_of(pool, row)).hexdigest() == row["sha256"]
    assert after[face]["object"] is None
    assert after[face]["sha256"] is not None
    now = read_footer(pool, Part("pool", "images", SHARD))
    assert (now.stage, now.fingerprint) == (footer.stage, footer.fingerprint)

    tags = {path: pool.tag(path) for path in pool.list("")}
    assert not purge_originals(pool, [SHARD], FOLDER, tmp_path, lambda: None).did_anything
    assert {path: pool.tag(path) for path in pool.list("")} == tags


def test_what_holds_more_than_was_seen_goes_too(pool: Any, tmp_path: Path) -> None:
    hiding = seen(pool, faces=[], num_faces=0)
    needle = bytes_of(pool, images(pool)[hiding])
    done = purge_originals(pool, [SHARD], FOLDER, tmp_path, lambda: None)
    assert (done.num_faces, done.num_hiding) == (0, 1)
    assert holding(pool, needle) == []
    assert images(pool)[hiding]["object"] is None
    assert not purge_originals(pool, [SHARD], FOLDER, tmp_path, lambda: None).did_anything


@pytest.mark.parametrize(("has_its_own", "stays"), [(True, True), (False, False)])
def test_other_settings_that_need_a_purged_original_lose_its_row(
    pool: Any, tmp_path: Path, has_its_own: bool, stays: bool
) -> None:
    hiding = seen(pool, faces=[], num_faces=0)
    rows = read_part(pool, Part("pool", FOLDER, SHARD)).to_pylist()
    for row in rows:
        if row["image_id"] == hiding and not has_its_own:
            row |= {"blurred_object": None, "blurred_offset": None, "blurred_bytes": None}
    put(
        pool,
        Part("pool", "detections/weak-1", SHARD),
        pa.Table.from_pylist(rows, schema=TABLES["detections"].schema),
        tmp_path,
    )
    put(pool, Part("pool", "hashes/weak-1", SHARD), read_part(pool, Part("pool", HASHES, SHARD)), tmp_path)
    done = purge_originals(pool, [SHARD], FOLDER, tmp_path, lambda: None)
    assert done.num_elsewhere == (0 if stays else 1)
    for folder in ("detections/weak-1", "hashes/weak-1"):
        ids = read_part(pool, Part("pool", folder, SHARD))["image_id"].to_pylist()
        assert (hiding in ids) is stays
        assert len(ids) == len(rows) - (not stays)


@pytest.mark.parametrize(
    ("theirs", "stays"),
    [
        ({"faces": [{**FACE, "w_px": 30.0}], "blurred": True}, True),  # the same face, found by others too
        ({"faces": [{**FACE, "x_px": 25.0}], "blurred": True}, False),  # another one
        ({"faces": [], "blurred": False}, False),
        ({"faces": [FACE], "blurred": False}, False),  # found, and look.blur was false
        ({"faces": [], "blurred": False, "unseen": True}, False),  # nobody looked at it by these settings
    ],
)
def test_other_settings_lose_what_may_show_the_face(
    pool: Any, tmp_path: Path, theirs: dict[str, Any], stays: bool
) -> None:
    face = seen(pool, faces=[FACE], num_faces=1)
    part, other = Part("pool", FOLDER, SHARD), Part("pool", "detections/weak-1", SHARD)
    writer = TarWriter(tmp_path / "small.tar")
    shown, rows = b"a picture with its face", []
    for row in read_part(pool, part).to_pylist():
        mine = row["image_id"] == face
        body = shown if mine else b"nobody"
        place = {"small_object": f"small/{SHARD:09d}-other.tar", "small_bytes": len(body)}
        place["small_offset"] = writer.add(f"{row['image_id']}", body)
        rows.append({**row, **place, "faces": theirs["faces"] if mine else [], "blurred_object": None})
        if mine and theirs["blurred"]:
            rows[-1] |= {"blurred_object": place["small_object"], "blurred_offset": 0, "blurred_bytes": 0}
    writer.close()
    pool.create(f"small/{SHARD:09d}-other.tar", tmp_path / "small.tar")
    schema = TABLES["detections"].schema
    put(pool, other, pa.Table.from_pylist(rows, schema=schema), tmp_path)
    put(pool, Part("pool", "hashes/weak-1", SHARD), read_part(pool, Part("pool", HASHES, SHARD)), tmp_path)
    for mine in (part, Part("pool", HASHES, SHARD)) if theirs.get("unseen") else ():
        table = read_part(pool, mine)
        swap(pool, mine, table.filter(pc.not_equal(table["image_id"], face)), tmp_path)

    done = purge_originals(pool, [SHARD], FOLDER, tmp_path, lambda: None)
    assert done.num_elsewhere == (0 if stays else 1)
    assert bool(holding(pool, shown)) is stays
    for folder in ("detections/weak-1", "hashes/weak-1"):
        ids = read_part(pool, Part("pool", folder, SHARD))["image_id"].to_pylist()
        assert (face in ids) is stays
        assert len(ids) == len(rows) - (not stays)


def put(pool: Any, part: Part, table: pa.Table, scratch: Path) -> None:
    write_part(table, scratch / "put", stage="look", version=1, fingerprint="f", inputs={})
    assert pool.create(part.path, scratch / "put")


def test_killed_at_any_write_and_run_again_it_ends_the_same(pool: Any, tmp_path: Path, small_run: Any) -> None:
    face = seen(pool, faces=[FACE], num_faces=1)
    needle = bytes_of(pool, images(pool)[face])

    class Killed(Exception):
        pass

    writes = 0

    def check() -> None:
        nonlocal left, writes
        writes += 1
        left -= 1
        if left < 0:
            raise Killed

    for lives in range(200):
        left = lives
        try:
            purge_originals(pool, [SHARD], FOLDER, tmp_path, check)
        except Killed:
            continue
        break
    else:
        pytest.fail("it never ends")
    assert writes > 1
    assert holding(pool, needle) == []
    assert not purge_originals(pool, [SHARD], FOLDER, tmp_path, lambda: None).did_anything


def test_nobody_else_may_have_the_pool(pool: Any, tmp_path: Path) -> None:
    seen(pool, faces=[FACE], num_faces=1)
    before = {path: pool.tag(path) for path in pool.list("")}

    def check() -> None:
        raise LeaseLostError("gone")

    with pytest.raises(LeaseLostError):
        purge_originals(pool, [SHARD], FOLDER, tmp_path, check)
    assert {path: pool.tag(path) for path in pool.list("")} == before


def test_shards_that_this_command_has_not_looked_at_stay(pool: Any, tmp_path: Path) -> None:
    seen(pool, faces=[FACE], num_faces=1)
    before = {path: pool.tag(path) for path in pool.list("")}
    others = [shard for shard in (0, 1_000_000, 2_000_000, 3_000_001) if shard != SHARD]
    purge_originals(pool, others, FOLDER, tmp_path, lambda: None)
    mine = [path for path in before if f"{SHARD:09d}" in path]
    assert mine
    assert all(pool.tag(path) == before[path] for path in mine)


def test_a_pool_in_an_object_store(pool: Any, tmp_path: Path, in_a_bucket: Any) -> None:
    face = seen(pool, faces=[FACE], num_faces=1)
    needle, before = bytes_of(pool, images(pool)[face]), images(pool)
    bucket = in_a_bucket(pool)
    assert holding(bucket, needle)
    assert purge_originals(bucket, [SHARD], FOLDER, tmp_path, lambda: None).num_faces == 1
    assert holding(bucket, needle) == []
    for image_id, row in images(bucket).items():
        if row["object"] is not None:
            assert hashlib.sha256(bytes_of(bucket, row)).hexdigest() == before[image_id]["sha256"]
    assert not purge_originals(bucket, [SHARD], FOLDER, tmp_path, lambda: None).did_anything
