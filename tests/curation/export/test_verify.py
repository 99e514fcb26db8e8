import json
from typing import Any

import pytest

from curation.export.export import LINEAGE, ExportConfig
from curation.export.verify import verify


@pytest.fixture
def exported(small_run: Any) -> Any:
    small_run.export(ExportConfig(samples_per_tar=4))
    return small_run


def test_a_good_run_has_no_problem(exported: Any):
    assert verify(exported.store("run")) == ([], 6)


def test_a_picture_may_be_there_as_often_as_it_was_chosen(exported: Any):
    exported.take_twice()
    problems, num_samples = verify(exported.store("run"))
    assert num_samples == 7  # of which the last is told by hand, and in no tar
    assert problems
    assert not any("in the set" in problem for problem in problems)


def test_a_picture_that_nobody_chose_is_found(exported: Any):
    rows = exported.read("choices", 3_000_001)
    exported.write("choices", 3_000_001, rows[1:])
    problems, _ = verify(exported.store("run"))
    assert problems == [f"image {rows[0]['image_id']}: in the set 1 times, chosen 0"]


def test_a_changed_byte_is_found(exported: Any):
    row = next(row for row in exported.read("manifest", 1) if not row["blurred"])
    path = exported.run / row["tar"]
    data = bytearray(path.read_bytes())
    data[row["offset"] + row["size"] // 2] ^= 0xFF
    path.write_bytes(data)
    problems, num_samples = verify(exported.store("run"))
    assert num_samples == 6
    assert any("sha256 is" in problem for problem in problems)
    assert any(f"{row['key']}: its bytes have another sha256" in problem for problem in problems)


def with_json(run: Any, change: Any) -> str:
    """Problems after the json of the first sample became ``change`` of it, in the same number of bytes."""
    row = run.read("manifest", 0)[0]
    path = run.run / row["tar"]
    data = path.read_bytes()
    start = data.index(b"{", row["offset"] + row["size"])
    stop = data.index(b"}", start) + 1
    changed = json.dumps(change(json.loads(data[start:stop])), ensure_ascii=False).encode().ljust(stop - start)
    assert len(changed) == stop - start
    path.write_bytes(data[:start] + changed + data[stop:])
    return "\n".join(verify(run.store("run"))[0])


def test_a_json_that_is_not_the_lineage_is_found(exported: Any):
    problems = with_json(exported, lambda told: {"urk": "", "image_id": 5})
    assert "json says image_id 5, manifest " in problems
    assert "json holds 'urk', which is no lineage" in problems
    assert all(f"json lacks {name}" in problems for name in LINEAGE if name != "image_id")


@pytest.mark.parametrize("told", [[], [["image_id", 5]], None, "text", 3])
def test_a_json_that_is_no_object_is_a_problem(exported: Any, told: Any):
    assert f"json is no object: {told!r}" in with_json(exported, lambda _: told)


def test_a_cut_off_tar_is_found(exported: Any):
    path = exported.run / exported.read("shards", 0)[0]["tar"]
    path.write_bytes(path.read_bytes()[:1000])
    problems, _ = verify(exported.store("run"))
    assert any("1,000 bytes, shards says" in problem for problem in problems)
    assert any("cannot be read there" in problem for problem in problems)
    assert any("does not decode" in problem for problem in problems)


def test_a_missing_tar_and_one_that_nobody_names_are_found(exported: Any):
    path = exported.run / exported.read("shards", 0)[0]["tar"]
    path.rename(path.with_name("other.tar"))
    problems, _ = verify(exported.store("run"))
    assert f"tars/{path.name}: missing" in problems
    assert "tars/other.tar: no table names it" in problems


def test_wrong_rows_of_the_manifest_are_found(exported: Any):
    first = exported.read("manifest", 0)
    exported.change("manifest", 0, 1, image_id=first[0]["image_id"], width_px=1)
    exported.change("manifest", 0, 2, key="000000007", offset=first[2]["offset"] + 512)
    problems, _ = verify(exported.store("run"))
    text = "\n".join(problems)
    assert f"image {first[0]['image_id']}: in the set 2 times, chosen 1" in text
    assert "is 64 x 48, manifest says otherwise" in text
    assert "the key should be 000000002" in text
    assert "should be" in text
