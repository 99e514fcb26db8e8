import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.export.purge import pending, pictures_named, purge, put_rules
from curation.ingest.takedown import known_rules, rule_of
from curation.lease import LeaseLostError
from curation.schema import TABLES, Part, vector_schema
from curation.store import LocalStore, read_footer, read_part

FIRST, SECOND = 3_000_000_000_000, 3_000_001_000_000
SHARDS = (0, 1_000_000, 2_000_000, 3_000_000, 3_000_001)
DIM = 8


def vector(image_id: int) -> np.ndarray:
    row = np.random.default_rng(image_id % 99_991).standard_normal(DIM)
    return (row / np.linalg.norm(row)).astype(np.float16)


@pytest.fixture
def small(small_run: Any) -> Any:
    """The small run with vectors of two models, and k-means fits: one has a centroid that is the first picture."""
    for shard in SHARDS:
        rows = small_run.read("hashes", shard)
        columns = [
            pa.array([row[name] for row in rows], kind)
            for name, kind in (("image_id", pa.int64()), ("sha256", pa.string()))
        ]
        flat = np.concatenate([vector(row["image_id"]) for row in rows])
        table = pa.table([*columns, pa.FixedSizeListArray.from_arrays(pa.array(flat), DIM)], schema=vector_schema(DIM))
        for folder in ("descriptors/a-1", "embeddings/b-2"):
            small_run.put(Part("pool", folder, shard), table, stage="describe", fingerprint=f"f{shard}")
    for number, ids in enumerate(([FIRST, SECOND], [SECOND + 1, SECOND + 3])):
        centroids = [{"cluster": n, "vector": vector(i).astype(np.float32)} for n, i in enumerate(ids)]
        fit = pa.Table.from_pylist(centroids, schema=TABLES["fit_kmeans"].schema)
        small_run.put(Part("pool", f"fits/fit_kmeans/kmeans-{number}", 0), fit)
        # A level above: cluster 0 is alone below it, so that its centroid is the same.
        levels = [{"level": 0, "cluster": n, "parent": 0} for n in range(2)]
        levels.append({"level": 1, "cluster": 0, "vector": vector(ids[0]).astype(np.float32)})
        above = pa.Table.from_pylist(levels, schema=TABLES["fit_hierarchy"].schema)
        small_run.put(Part("pool", f"fits/fit_hierarchy/levels-{number}", 0), above)
    return small_run


def stored(pool: Any, table: str, shard: int, folder: str | None = None) -> dict[int, dict[str, Any]]:
    return {row["image_id"]: row for row in read_part(pool, Part("pool", folder or table, shard)).to_pylist()}


def traces(pool: Any, *ids: int) -> list[bytes]:
    """Bytes of some pictures, of their thumbnails and blurred versions, and their vectors."""
    found = [vector(image_id).tobytes() for image_id in ids]
    for image_id in ids:
        shard = image_id // 1_000_000
        image, seen = stored(pool, "images", shard)[image_id], stored(pool, "detections", shard)[image_id]
        places = [(image["object"], image["offset"], image["num_bytes"])]
        places += [
            tuple(seen[f"{kind}_{what}"] for what in ("object", "offset", "bytes")) for kind in ("small", "blurred")
        ]
        found += [pool.read_range(*place) for place in places if place[0] is not None]
    return found


def left_over(pool: Any, needles: list[bytes]) -> list[str]:
    found = []
    for path in pool.list(""):
        data = pool.read(path)
        found += [path for needle in needles if needle in data]
        folder, _, name = path.rpartition("/")
        if folder.partition("/")[0] in ("descriptors", "embeddings"):
            rows = read_part(pool, Part("pool", folder, int(name[5:14])))["vector"].to_pylist()
            found += [path for row in rows if np.array(row, np.float16).tobytes() in needles]
    return found


def everything_else(pool: Any, *gone: int) -> dict[int, list[bytes]]:
    """Of each other picture what is stored, read where the tables say it lies."""
    return {
        image_id: traces(pool, image_id)
        for shard in SHARDS
        for image_id, row in stored(pool, "images", shard).items()
        if row["ok"] and image_id not in gone and image_id in stored(pool, "detections", shard)
    }


def test_nothing_is_left_of_a_picture_and_the_others_stay(small: Any, tmp_path: Path):
    pool = small.store("pool")
    gone = (FIRST, SECOND)  # one by its address, with a blurred face; one by its bytes
    needles, others = traces(pool, *gone), everything_else(pool, *gone)
    assert len(needles) == 7
    assert len(left_over(pool, needles)) >= 9
    (pool.path / "bytes/000000777-orphan.tar").write_bytes(needles[2])  # what a killed worker left
    before = {table: read_footer(pool, Part("pool", table, 3_000_000)) for table in ("images", "hashes")}
    sha256 = stored(pool, "images", 3_000_001)[SECOND]["sha256"]
    put_rules(pool, [rule_of(f"http://H0.test/web/{FIRST}.jpg"), rule_of(sha256)], tmp_path)
    assert pending(pool)
    assert pictures_named(pool, known_rules(pool)) == set(gone)
    done = purge(pool, tmp_path, lambda: None)
    assert not pending(pool)
    assert done.image_ids == set(gone)
    assert left_over(pool, needles) == []
    assert everything_else(pool, *gone) == others
    assert [(rule.kind, rule.applied) for rule in known_rules(pool)] == [
        ("url", True),
        ("sha256", True),
        ("sha256", True),
    ]
    assert known_rules(pool)[2].reason == f"bytes of image {FIRST}"

    row = stored(pool, "images", 3_000_000)[FIRST]
    assert (row["ok"], row["reason"], row["sha256"], row["object"]) == (False, "taken_down", None, None)
    assert row["http_status"] is None  # as a row that was never asked for
    assert stored(pool, "images", 3_000_001)[SECOND]["http_status"] == 200
    for table, footer in before.items():
        now = read_footer(pool, Part("pool", table, 3_000_000))
        assert (now.stage, now.fingerprint) == (footer.stage, footer.fingerprint)
        assert now.digest != footer.digest
    # A centroid that was one of them is gone with its fit; the other fits stay.
    left = sorted(path.split("/")[2] for path in pool.list("fits"))
    assert (left, done.num_fits) == (["kmeans-1", "levels-1"], 2)


def test_a_rule_that_names_nothing_changes_nothing(small: Any, tmp_path: Path):
    pool = small.store("pool")
    before = {path: pool.tag(path) for path in pool.list("") if "blurred" not in path}
    put_rules(pool, [rule_of("http://elsewhere.test/1.jpg"), rule_of("ab" * 32)], tmp_path)
    done = purge(pool, tmp_path, lambda: None)
    assert (done.image_ids, done.num_parts, done.num_fits) == (set(), 0, 0)
    assert {path: pool.tag(path) for path in before if path in set(pool.list(""))}.items() <= before.items()
    assert not pending(pool)


def test_by_hash_within_its_radius_and_the_same_bytes_elsewhere(small: Any, tmp_path: Path):
    """The pHash of a picture of the small run is its id."""
    pool = small.store("pool")
    same = stored(pool, "images", 3_000_001)[SECOND]
    small.change("images", 3_000_000, 4, sha256=same["sha256"])
    code = f"{SECOND ^ (3 << 60):016x}"
    put_rules(pool, [rule_of(code, radius_bits=1)], tmp_path)
    assert pictures_named(pool, known_rules(pool)) == set()
    put_rules(pool, [rule_of(code, radius_bits=2)], tmp_path)
    named = pictures_named(pool, known_rules(pool))
    assert {SECOND, small.read("images", 3_000_000)[4]["image_id"]} <= named
    purge(pool, tmp_path, lambda: None)
    assert stored(pool, "images", 3_000_001)[SECOND]["reason"] == "taken_down"
    assert small.read("images", 3_000_000)[4]["reason"] == "taken_down"
    assert all(rule.kind == "sha256" for rule in known_rules(pool)[1:])


def test_by_pdq_also_where_another_model_looked_before_there_were_any(small: Any, tmp_path: Path):
    pool = small.store("pool")
    old = small.read("hashes", 3_000_001)
    before = pa.Table.from_pylist(old, schema=TABLES["hashes"].schema).drop_columns(["pdq", "pdq_quality"])
    small.put(Part("pool", "hashes/old-1", 3_000_001), before)
    codes = [{"image_id": row["image_id"], "sha256": row["sha256"], "pca_hash": 7} for row in old]
    table = pa.Table.from_pylist(codes, schema=TABLES["pca_hashes"].schema)
    small.put(Part("pool", "pca_hashes/grey32-1", 3_000_001), table)
    small.change("hashes", 3_000_001, 0, pdq="0f" * 32, pdq_quality=90)
    put_rules(pool, [rule_of("0f" * 31 + "00", kind="pdq")], tmp_path)
    assert pictures_named(pool, known_rules(pool)) == {SECOND}
    needles = traces(pool, SECOND)
    assert purge(pool, tmp_path, lambda: None).image_ids == {SECOND}
    assert left_over(pool, needles) == []
    for folder in ("hashes", "hashes/old-1", "pca_hashes/grey32-1"):
        assert SECOND not in stored(pool, "hashes", 3_000_001, folder)
    assert not pending(pool)


def test_what_look_met_is_pending_until_it_is_purged(small: Any, tmp_path: Path):
    pool = small.store("pool")
    put_rules(pool, [rule_of("f" * 16, radius_bits=0)], tmp_path)
    purge(pool, tmp_path, lambda: None)
    assert not pending(pool)
    small.change("hashes", 3_000_001, 0, ok=False, reason="taken_down", phash=None)
    assert pending(pool)
    needles = traces(pool, SECOND)
    assert purge(pool, tmp_path, lambda: None).image_ids == {SECOND}
    assert not pending(pool)
    assert left_over(pool, needles) == []


def test_killed_at_any_write_a_second_purge_finishes_it(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class KilledError(BaseException):
        pass

    sources = small.store("pool")
    needles, others = traces(sources, FIRST, SECOND + 1), everything_else(sources, FIRST, SECOND + 1)
    rules = [rule_of(f"http://h0.test/web/{FIRST}.jpg"), rule_of(f"{SECOND + 1:016x}", radius_bits=0)]
    put_rules(sources, rules, tmp_path)
    whole = LocalStore(str(shutil.copytree(small.pool, tmp_path / "whole")))
    purge(whole, tmp_path, lambda: None)
    assert left_over(whole, needles) == []
    assert everything_else(whole, FIRST, SECOND + 1) == others
    expected, left = _digests(whole), 0

    def counted(real: Any) -> Any:
        def write(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise KilledError
            return real(*arguments)

        return write

    for name in ("create", "replace", "delete"):
        monkeypatch.setattr(LocalStore, name, counted(getattr(LocalStore, name)))
    kills = []
    for number in range(1, 100, 2):
        folder = tmp_path / f"killed-{number}"
        pool = LocalStore(str(shutil.copytree(small.pool, folder, copy_function=os.link)))
        left = number
        try:
            purge(pool, tmp_path, lambda: None)
        except KilledError:
            kills.append(number)
            assert pending(pool)
            left = 0
            purge(pool, tmp_path, lambda: None)
        assert not pending(pool)
        assert _digests(pool) == expected
        shutil.rmtree(folder)
        if number not in kills:
            break
    assert kills[-1] >= 19


def _digests(pool: LocalStore) -> dict[str, str]:
    """sha256 of every object but the list, which holds times."""
    paths = (path for path in pool.list("") if not path.startswith("takedowns"))
    return {path: hashlib.sha256(pool.read(path)).hexdigest() for path in paths}


def test_a_lost_lease_stops_it_before_the_next_write(small: Any, tmp_path: Path):
    pool = small.store("pool")
    put_rules(pool, [rule_of(f"http://h0.test/web/{FIRST}.jpg")], tmp_path)
    before = {path: pool.tag(path) for path in pool.list("")}

    def lost() -> None:
        raise LeaseLostError("another driver took it over")

    with pytest.raises(LeaseLostError):
        purge(pool, tmp_path, lost)
    assert {path: pool.tag(path) for path in pool.list("")} == before


def test_a_pool_in_an_object_store(small: Any, tmp_path: Path, in_a_bucket: Any):
    local = small.store("pool")
    needles, others = traces(local, FIRST), everything_else(local, FIRST)
    pool = in_a_bucket(local)
    put_rules(pool, [rule_of(f"http://h0.test/web/{FIRST}.jpg")], tmp_path)
    assert purge(pool, tmp_path, lambda: None).image_ids == {FIRST}
    assert left_over(pool, needles) == []
    assert everything_else(pool, FIRST) == others
    assert not pending(pool)
