import json
import tarfile
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from curation.export.export import ExportConfig, shuffle_key

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


def test_a_second_export_has_nothing_to_do_and_a_new_seed_moves_samples(small_run: Any):
    assert small_run.export(ExportConfig(samples_per_tar=4)) == 4  # the order, two tars, their list
    before = {path.name: path.read_bytes() for path in (small_run.run / "tars").iterdir()}
    assert small_run.export(ExportConfig(samples_per_tar=4)) == 0
    order = [row["image_id"] for row in small_run.read("export_plan", 0)]
    assert small_run.export(ExportConfig(samples_per_tar=4, seed=1)) == 4
    assert order != [row["image_id"] for row in small_run.read("export_plan", 0)]
    again = [row["sha256"] for row in small_run.read("shards", 0)]
    small_run.export(ExportConfig(samples_per_tar=4))
    assert again != [row["sha256"] for row in small_run.read("shards", 0)]
    assert all((small_run.run / "tars" / name).read_bytes() == data for name, data in before.items())


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
        rows = small_run.read("selection", shard)
        small_run.write("selection", shard, [{**row, "keep": False, "reason": "not_retrieved"} for row in rows])
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
