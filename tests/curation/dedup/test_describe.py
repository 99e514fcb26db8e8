"""From stored 288-px pictures to a fit and to vectors: a pure function per row, a sample that no verdict moves."""

import hashlib
import io
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation.dedup.copydescriptor import DescriptorConfig
from curation.dedup.describe import (
    Describe,
    FitDescriptor,
    arrays_to_table,
    sample_of,
    table_to_arrays,
    vectors_of,
)
from curation.dedup.siftvlad import DIM
from curation.schema import image_ids, vector_schema


def picture(seed: int) -> bytes:
    """Coloured noise at three scales, as JPEG."""
    draw = np.random.default_rng(seed)
    layers = [draw.integers(0, 256, (n, n, 3), dtype=np.uint8) for n in (5, 20, 70)]
    scaled = [np.asarray(Image.fromarray(layer).resize((160, 120)), np.float32) for layer in layers]
    out = io.BytesIO()
    Image.fromarray(np.mean(scaled, 0).astype(np.uint8)).save(out, "JPEG", quality=92)
    return out.getvalue()


def looked_at(memory: Any, shard: int, seeds: list[int], role: str = "pool") -> None:
    """A shard whose small pictures lie one after the other in one object; the last row did not decode."""
    data = [picture(seed) for seed in seeds]
    offsets = np.cumsum([0] + [len(blob) for blob in data])[:-1].tolist()
    names = [hashlib.sha256(blob).hexdigest() for blob in data]
    ids = image_ids(shard, len(data) + 1)
    memory.roles[shard] = role
    memory.blobs[f"small/{shard}.tar"] = b"".join(data)
    memory.put("hashes", shard, image_id=ids, sha256=[*names, "broken"], ok=[True] * len(data) + [False])
    memory.put(
        "detections",
        shard,
        image_id=ids,
        sha256=[*names, "broken"],
        small_object=[f"small/{shard}.tar"] * len(data) + [None],
        small_offset=[*offsets, None],
        small_bytes=[len(blob) for blob in data] + [None],
    )
    memory.keep("near", shard, ids[:-1], names)
    memory.keep("safety", shard, ids[:-1], names)


CONFIG = DescriptorConfig(
    fit_pictures=12, fit_shards=2, fit_at_least=40, duplicate_threshold=0.5, leakage_threshold=0.5
)


@pytest.fixture(scope="module")
def fitted(new_io: Any) -> Any:
    memory = new_io()
    looked_at(memory, 0, list(range(10)))
    looked_at(memory, 1, list(range(5, 15)))
    looked_at(memory, 2, [90, 91])
    looked_at(memory, 1_000_000, [3, 92], role="benchmark")
    fit = FitDescriptor(CONFIG)
    assert fit.folder("fit_descriptor", memory).startswith("fits/fit_descriptor/sift-vlad-dct-")
    fit.run(memory, memory.map)
    return memory


@pytest.fixture
def described(fitted: Any) -> Any:
    """A fit takes seconds: each test has a copy of one."""
    return deepcopy(fitted)


def describe(memory: Any, shard: int, rows: list[int] | None = None) -> Any:
    kept = memory.kept("near", shard)
    kept = kept if rows is None else kept.take(pa.array(rows, pa.int64()))
    return Describe(CONFIG).run(shard, replace(memory, shard=shard, rows=kept))["descriptors"]


def test_vectors_follow_from_the_pixels_alone(described: Any) -> None:
    first, second = describe(described, 0), describe(described, 1)
    assert first.schema.equals(vector_schema(DIM))
    assert first["image_id"].to_pylist() == list(range(10))
    np.testing.assert_array_equal(vectors_of(first)[5:], vectors_of(second)[:5])
    np.testing.assert_array_equal(vectors_of(describe(described, 0, [2, 7])), vectors_of(first)[[2, 7]])
    np.testing.assert_allclose(np.linalg.norm(vectors_of(first), axis=1), 1, atol=2e-3)
    benchmark = describe(described, 1_000_000)
    np.testing.assert_array_equal(vectors_of(benchmark)[0], vectors_of(first)[3])
    assert describe(described, 0, []).num_rows == 0


def test_the_sample_is_the_least_sha256_of_the_first_shards_and_each_content_once(described: Any) -> None:
    places = sample_of(described, [0, 1], 12)
    assert len(places) == 12
    names: dict[str, int] = {}
    for shard in (0, 1):
        table = described.read(described.part("hashes", shard))
        for row in table.to_pylist():
            if row["ok"]:
                names.setdefault(row["sha256"], row["image_id"])
    assert [place["image_id"] for place in places] == [names[name] for name in sorted(names)[:12]]
    assert sample_of(described, [0, 1], 100)[:12] == places
    assert len(sample_of(described, [0, 1], 100)) == 15


def test_fits_and_their_arrays_are_stored_whole(described: Any) -> None:
    table = described.read(described.part("fit_descriptor", 0))
    arrays = table_to_arrays(table)
    assert arrays_to_table(arrays) == table
    assert arrays["vlad_axes"].shape[0] == arrays["vlad_mean"].shape[0]
    FitDescriptor(CONFIG).run(described, described.map)
    assert described.read(described.part("fit_descriptor", 0)) == table


def test_folders_tell_models_and_fits_apart(described: Any) -> None:
    one = Describe(CONFIG).folder("descriptors", described)
    others = [
        Describe(CONFIG.model_copy(update=change)).folder("descriptors", described)
        for change in ({"fit_pictures": 13}, {"fit_shards": 3}, {"fit_at_least": 41}, {"fit_seed": 1})
    ]
    assert one.startswith("descriptors/sift-vlad-dct-")
    assert len({one, *others}) == 5


def test_a_descriptor_with_weights_needs_no_fit(described: Any, tmp_path: Any) -> None:
    (tmp_path / "w.pt").write_bytes(b"weights")
    FitDescriptor(DescriptorConfig(name=f"sscd:{tmp_path / 'w.pt'}")).run(described, described.map)
    assert described.read(described.part("fit_descriptor", 0)).num_rows == 0


def test_a_row_without_a_stored_picture_is_no_silent_zero(described: Any) -> None:
    kept = described.read(described.part("detections", 0)).select(["image_id", "sha256"])
    with pytest.raises(LookupError, match="picture 10 passed safety, but look stored no 288-px version of it"):
        Describe(CONFIG).run(0, replace(described, shard=0, rows=kept))


@pytest.mark.parametrize("num", [0, 3])
@pytest.mark.parametrize("dim", [8, 512])
def test_vectors_come_back_from_a_table(num: int, dim: int) -> None:
    vectors = np.random.default_rng(1).normal(size=(num, dim)).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
    table = pa.table([pa.array(range(num), pa.int64()), pa.array(["x"] * num), column], schema=vector_schema(dim))
    assert vectors_of(pa.concat_tables([table[:1], table[1:]])).tolist() == vectors.tolist()
    assert vectors_of(vector_schema(dim).empty_table()).shape == (0, dim)
