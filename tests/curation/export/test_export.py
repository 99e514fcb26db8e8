import hashlib
import json
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from curation.export.export import ExportConfig, key_range, part_rows, runs_of, shuffle_key, slices_of
from curation.export.objects import swap
from curation.export.verify import verify
from curation.schema import Part
from curation.store import read_part

WITH_FACE = 3_000_000_000_000
AS_PNG = 3_000_001_000_003
CHOSEN = {1_000_000_000_000, 1_000_000_000_001, WITH_FACE, 3_000_001_000_000, AS_PNG, 3_000_001_000_005}


def exported(run: Any, **config: Any) -> list[dict[str, Any]]:
    run.export(ExportConfig(**config))
    num_tars = len(run.read("shards", 0))
    return [row for tar in range(num_tars) for row in run.read("manifest", tar)]


def test_every_chosen_picture_is_in_one_tar_with_its_lineage(small_run: Any):
    rows = exported(small_run, samples_per_tar=4)
    assert {row["image_id"] for row in rows} == CHOSEN
    assert [row["key"] for row in rows] == [f"{n:09d}" for n in range(6)]
    assert [shard["num_samples"] for shard in small_run.read("shards", 0)] == [4, 2]
    for row in rows:
        with tarfile.open(small_run.run / row["tar"]) as tar:
            side = json.loads(tar.extractfile(f"{row['key']}.json").read())
            data = tar.extractfile(f"{row['key']}.{row['ext']}").read()
        assert data == (small_run.run / row["tar"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        assert list(side) == sorted(side)
        assert side == {name: row[name] for name in side}
        assert side["part"] == ("flowers" if row["image_id"] < 2_000_000_000_000 else "dogs")
        assert "grün" in side["alt_text"]


def test_faces_are_blurred_and_other_bytes_are_the_original(small_run: Any):
    rows = {row["image_id"]: row for row in exported(small_run)}
    assert rows[WITH_FACE]["blurred"]
    assert [image for image, row in rows.items() if row["blurred"]] == [WITH_FACE]
    assert (rows[AS_PNG]["ext"], rows[WITH_FACE]["ext"]) == ("png", "jpg")
    seen = next(row for row in small_run.read("detections", 3_000_000) if row["image_id"] == WITH_FACE)
    start = seen["blurred_offset"]
    blurred = (small_run.pool / seen["blurred_object"]).read_bytes()[start : start + seen["blurred_bytes"]]
    row = rows[WITH_FACE]
    assert (small_run.run / row["tar"]).read_bytes()[row["offset"] : row["offset"] + row["size"]] == blurred


@pytest.mark.parametrize("is_purged", [False, True])
def test_what_was_seen_of_a_file_stands_in_for_an_original_that_is_gone_and_for_no_other(
    small_run: Any, tmp_path: Path, is_purged: bool
):
    pool = small_run.store("pool")
    for table, changes in (
        ("detections", {"num_faces": 0, "faces": []}),
        ("images", {"object": None, "offset": None} if is_purged else {}),
    ):
        part = Part("pool", table, WITH_FACE // 1_000_000)
        held = read_part(pool, part)
        rows = [row | (changes if row["image_id"] == WITH_FACE else {}) for row in held.to_pylist()]
        swap(pool, part, pa.Table.from_pylist(rows, schema=held.schema), tmp_path)
    row = next(row for row in exported(small_run) if row["image_id"] == WITH_FACE)
    assert row["blurred"] is is_purged
    data = (small_run.run / row["tar"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
    assert (hashlib.sha256(data).hexdigest() == row["sha256"]) is not is_purged


def test_a_second_export_has_nothing_to_do_and_a_new_seed_moves_samples(small_run: Any):
    assert (
        small_run.export(ExportConfig(samples_per_tar=4)) == 6
    )  # the order in two rounds, two tars, their list in two
    before = {path.name: path.read_bytes() for path in (small_run.run / "tars").iterdir()}
    assert small_run.export(ExportConfig(samples_per_tar=4)) == 0
    order = [row["image_id"] for row in small_run.read("export_plan", 0)]
    assert small_run.export(ExportConfig(samples_per_tar=4, seed=1)) == 6
    assert order != [row["image_id"] for row in small_run.read("export_plan", 0)]
    again = [row["sha256"] for row in small_run.read("shards", 0)]
    small_run.export(ExportConfig(samples_per_tar=4))
    assert again != [row["sha256"] for row in small_run.read("shards", 0)]
    assert all((small_run.run / "tars" / name).read_bytes() == data for name, data in before.items())


def test_another_number_of_samples_a_tar_writes_tars_and_nothing_else(small_run: Any):
    rows = exported(small_run, samples_per_tar=4)
    before = small_run.read("export_plan", 0)
    assert small_run.export(ExportConfig(samples_per_tar=5)) == 4  # two tars, their list in two
    assert small_run.read("export_plan", 0) == before
    again = [row for tar in range(2) for row in small_run.read("manifest", tar)]
    assert [row["num_samples"] for row in small_run.read("shards", 0)] == [5, 1]
    placed = ("tar", "offset")
    assert [{k: v for k, v in row.items() if k not in placed} for row in again] == [
        {k: v for k, v in row.items() if k not in placed} for row in rows
    ]


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_however_the_order_is_made_the_tars_are_the_same(
    small_run: Any, monkeypatch: pytest.MonkeyPatch, num_rows: int
):
    """Runs of one shard and ranges of a few samples: a tar is cut from several parts of the plan."""
    small_run.take_twice(in_manifest=False)
    rows = exported(small_run, samples_per_tar=4)
    tars = {path.name: path.read_bytes() for path in (small_run.run / "tars").iterdir()}
    for path in small_run.run.glob("export_*/*"):
        path.unlink()
    monkeypatch.setattr("curation.export.export._ROWS", num_rows)
    assert exported(small_run, samples_per_tar=4) == rows
    assert len(list((small_run.run / "export_plan").iterdir())) == -(-7 // num_rows)
    assert {path.name: path.read_bytes() for path in (small_run.run / "tars").iterdir()} == tars


def test_the_order_is_that_of_a_slow_sort(small_run: Any):
    small_run.take_twice(in_manifest=False)
    rows = exported(small_run, seed=3)
    chosen = [row for shard in (1_000_000, 3_000_000, 3_000_001) for row in small_run.read("choices", shard)]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        told = f"3|{row['sha256']}|{row['image_id']}" + (f"|{row['copy']}" if row["copy"] else "")
        return hashlib.sha256(told.encode()).hexdigest(), row["image_id"], row["copy"]

    wanted = [(row["image_id"], row["query_id"]) for row in sorted(chosen, key=place)]
    assert [(row["image_id"], row["query_id"]) for row in rows] == wanted
    assert len(wanted) == len(CHOSEN) + 1
    assert verify(small_run.store("run")) == ([], 7)


def test_a_picture_that_is_there_more_often_than_chosen_is_told(small_run: Any):
    small_run.take_twice(in_manifest=False)
    exported(small_run)
    small_run.write("choices", 3_000_001, [row for row in small_run.read("choices", 3_000_001) if not row["copy"]])
    problems, _ = verify(small_run.store("run"))
    assert problems == ["image 3000001000000: in the set 2 times, chosen 1"]


def test_ranges_of_keys_leave_none_out():
    for num in (1, 2, 3, 7, 1000):
        ranges = [key_range(number, num) for number in range(num)]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == 1 << 62
        assert all(end == first for (_, end), (first, _) in pairwise(ranges))


@given(st.lists(st.integers(0, 9), max_size=8), st.data())
def test_slices_are_the_rows_of_all_parts(sizes: list[int], data: st.DataObject):
    every = [(part, row) for part, size in enumerate(sizes) for row in range(size)]
    first = data.draw(st.integers(0, len(every)))
    end = data.draw(st.integers(first, len(every)))
    assert [(part, row) for part, a, b in slices_of(sizes, first, end) for row in range(a, b)] == every[first:end]
    cut = [sizes[one] for one in runs_of(sizes, 20)]
    assert [size for some in cut for size in some] == sizes


def test_a_large_set_has_larger_parts_and_no_more():
    for total in (0, 65_536, 33_554_432, 33_554_433, 142_109_386, 10**9):
        rows = part_rows(total)
        assert -(-total // rows) <= 512
        assert rows == 65_536 or -(-total // rows) > 256


def test_hugging_face_datasets_reads_the_set(small_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    rows = exported(small_run, samples_per_tar=4)
    # One kind of picture a column, as the loader takes the columns of the first samples.
    tars = [str(small_run.run / row["tar"]) for row in small_run.read("shards", 0)]
    found = datasets.load_dataset("webdataset", data_files={"train": tars}, split="train", cache_dir=str(tmp_path))
    assert [row["__key__"] for row in found] == [row["key"] for row in rows]
    assert [row["json"]["image_id"] for row in found] == [row["image_id"] for row in rows]
    assert [row["json"]["part"] for row in found] == [row["part"] for row in rows]
    assert {row["jpg"].size for row in found if row.get("jpg") is not None} == {(64, 48)}


def test_webdataset_reads_the_set(small_run: Any):
    webdataset = pytest.importorskip("webdataset")
    rows = exported(small_run, samples_per_tar=4)
    tars = [str(small_run.run / row["tar"]) for row in small_run.read("shards", 0)]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    assert [sample["json"]["image_id"] for sample in samples] == [row["image_id"] for row in rows]
    assert all(sample["jpg" if "jpg" in sample else "png"].shape == (48, 64, 3) for sample in samples)


def test_nothing_chosen_gives_no_tar(small_run: Any):
    for shard in (1_000_000, 2_000_000, 3_000_000, 3_000_001):
        small_run.write("choices", shard, [])
    assert exported(small_run) == []
    assert not (small_run.run / "tars").exists()


def test_shuffle_depends_on_bytes_seed_and_id_only():
    def order(numbers: list[int], seed: int) -> list[int]:
        return sorted(numbers, key=lambda n: shuffle_key(seed, f"{n:064x}", n))

    ids = list(range(1000))
    moved = np.mean([abs(place - n) for place, n in enumerate(order(ids, 0))])
    assert moved > 250  # a uniform shuffle moves by a third of the length
    assert order(ids, 1) != order(ids, 0)
    assert order(ids[:500], 0) == [n for n in order(ids, 0) if n < 500]


def test_config_is_checked():
    with pytest.raises(ValidationError, match="samples_per_tar"):
        ExportConfig(samples_per_tar=0)
