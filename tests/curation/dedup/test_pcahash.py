"""The PCA hash: halves the pictures on every bit, stays where a copy is saved smaller or worse, is always the same."""

import hashlib
import io
import tarfile
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from curation.dedup.describe import crops_of_installed_photographs, table_to_arrays
from curation.dedup.pcahash import (
    NUM_BITS,
    FitPcaHash,
    PcaHashConfig,
    PcaHashes,
    fit_pca_axes,
    hash_table,
    pca_hash,
    thumbnail,
)
from curation.schema import TABLES, image_ids
from training.data.pixels import decode, encode_jpeg, resize_shortest

CONFIG = PcaHashConfig(fit_pictures=350, fit_shards=2)


def crops(num: int, seed: int = 3) -> list[np.ndarray]:
    source = crops_of_installed_photographs(seed)
    return [next(source) for _ in range(num)]


def saved(rgb: np.ndarray, quality: int) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "JPEG", quality=quality)
    return decode(out.getvalue()).rgb


def small(rgb: np.ndarray) -> np.ndarray:
    """The 288-px version that look stores, as it is read again."""
    return decode(encode_jpeg(resize_shortest(rgb, 288), 95)).rgb


def code(rgb: np.ndarray, fit: dict[str, np.ndarray]) -> int:
    found = pca_hash(rgb, fit)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def fit() -> dict[str, np.ndarray]:
    return fit_pca_axes(np.stack([thumb for rgb in crops(400) if (thumb := thumbnail(rgb)) is not None]))


# --- pure functions -------------------------------------------------------------------------------------------------


def test_axes_are_those_of_an_svd_and_every_bit_halves_the_pictures(fit) -> None:
    pixels = np.stack([thumb for rgb in crops(400) if (thumb := thumbnail(rgb)) is not None])
    _, _, rows = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    along = np.abs((rows[:20] * fit["axes"].T[:20]).sum(1))
    np.testing.assert_allclose(along, 1, atol=1e-4)
    np.testing.assert_allclose(fit["axes"].T @ fit["axes"], np.eye(NUM_BITS), atol=1e-5)
    assert (fit["axes"][np.abs(fit["axes"]).argmax(0), np.arange(NUM_BITS)] > 0).all()
    bits = (pixels - fit["mean"]) @ fit["axes"] > fit["medians"]
    assert (np.abs(bits.mean(0) - 0.5) < 0.01).all()


def test_a_code_is_its_bits_first_axis_first(fit) -> None:
    rgb = crops(1, seed=9)[0]
    pixels = thumbnail(rgb)
    assert pixels is not None
    expected = 0
    for axis in range(NUM_BITS):
        expected = 2 * expected + int((pixels - fit["mean"]) @ fit["axes"][:, axis] > fit["medians"][axis])
    assert pca_hash(rgb, fit) == expected


def test_brightness_and_contrast_do_not_show() -> None:
    grey = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    rgb = np.repeat(grey[:, :, None], 3, 2)
    np.testing.assert_allclose(thumbnail(rgb), thumbnail(rgb + np.uint8(90)), atol=0.005)
    np.testing.assert_allclose(thumbnail(rgb), thumbnail(rgb * np.uint8(2)), atol=0.005)


def test_one_colour_has_no_code_and_any_shape_has_one(fit) -> None:
    noisy = np.full((300, 200, 3), 128, np.uint8)
    noisy[::7, ::5] += 1
    for rgb in (np.full((1, 1, 3), 9, np.uint8), np.full((3, 65_500, 3), 200, np.uint8), noisy):
        assert thumbnail(rgb) is None
        assert pca_hash(rgb, fit) is None
    for shape in ((2, 900, 3), (900, 2, 3), (31, 33, 3)):
        rgb = np.arange(np.prod(shape), dtype=np.uint32).astype(np.uint8).reshape(shape)
        assert 0 <= code(rgb, fit) < 2**64


def test_copies_stay_near_and_others_stay_away(shared_data) -> None:
    """On photographs that the fit has not seen: what the module says."""
    photos = []
    for name in ("pool_imagenet_300.tar", "pool_coco_48.tar"):
        with tarfile.open(shared_data / name) as tar:
            for member in [m for m in tar.getmembers() if not m.name.endswith(".csv")][::3]:
                photos.append(decode(tar.extractfile(member).read()).rgb)
    half, held_out = photos[::2], photos[1::2]
    fit = fit_pca_axes(np.stack([thumb for p in [*half, *crops(250)] if (thumb := thumbnail(small(p))) is not None]))
    codes = [code(small(p), fit) for p in held_out]
    assert len(codes) >= 50
    for p, own in zip(held_out, codes, strict=True):
        height, width = p.shape[:2]
        smaller = np.asarray(Image.fromarray(p).resize((width // 2, height // 2), Image.Resampling.LANCZOS))
        assert (code(small(saved(p, 20)), fit) ^ own).bit_count() <= 4
        assert (code(small(smaller), fit) ^ own).bit_count() <= 4
    apart = [(a ^ b).bit_count() for n, a in enumerate(codes) for b in codes[:n]]
    assert min(apart) > 6
    assert 30 < np.mean(apart) < 34


# --- stages ---------------------------------------------------------------------------------------------------------


def looked_at(memory: Any, shard: int, pictures: list[np.ndarray]) -> None:
    """A shard of stored pictures that safety lets through, and a last row that did not decode."""
    data = [encode_jpeg(rgb, 95) for rgb in pictures]
    offsets = np.cumsum([0] + [len(blob) for blob in data])[:-1].tolist()
    names = [hashlib.sha256(blob).hexdigest() for blob in data]
    ids = image_ids(shard, len(data) + 1)
    sha256 = [*names, "broken"]
    memory.roles[shard] = "pool"
    memory.blobs[f"small/{shard}.tar"] = b"".join(data)
    memory.put("hashes", shard, image_id=ids, sha256=sha256, ok=[True] * len(data) + [False], phash=range(len(ids)))
    memory.put(
        "detections",
        shard,
        image_id=ids,
        sha256=sha256,
        small_object=[f"small/{shard}.tar"] * len(data) + [None],
        small_offset=[*offsets, None],
        small_bytes=[len(blob) for blob in data] + [None],
    )
    memory.keep("safety", shard, ids[:-1], names)


def fitted(memory: Any, config: PcaHashConfig = CONFIG, hash_name: str = "pca_hash") -> pa.Table:
    stage = FitPcaHash(config, hash_name)
    stage.run(memory, memory.map)
    return memory.read(memory.part("fit_pca_hash", 0))


def hashed(memory: Any, shard: int, rows: list[int] | None = None) -> pa.Table:
    kept = memory.kept("safety", shard)
    kept = kept if rows is None else kept.take(pa.array(rows, pa.int64()))
    table = PcaHashes(CONFIG, "pca_hash").run(shard, replace(memory, shard=shard, rows=kept))["pca_hashes"]
    assert table.schema.equals(TABLES["pca_hashes"].schema)
    return table


def test_codes_follow_from_the_pixels_and_the_fit_alone(memory_io: Any) -> None:
    pictures = [*crops(6), np.full((40, 40, 3), 90, np.uint8)]
    looked_at(memory_io, 0, pictures)
    looked_at(memory_io, 1, pictures[3:])
    looked_at(memory_io, 2, crops(2, seed=8))
    fit = fitted(memory_io)
    assert fitted(memory_io).equals(fit)
    first, second = hashed(memory_io, 0), hashed(memory_io, 1)
    assert first["image_id"].to_pylist() == list(range(7))
    codes = first["pca_hash"].to_pylist()
    assert codes[6] is None
    assert len(set(codes)) == 7
    assert second["pca_hash"].to_pylist() == codes[3:]
    assert hashed(memory_io, 0, [1, 4])["pca_hash"].to_pylist() == [codes[1], codes[4]]
    assert hashed(memory_io, 0, []).num_rows == 0
    fit_of = table_to_arrays(fit)
    assert codes[0] == pca_hash(decode(encode_jpeg(pictures[0], 95)).rgb, fit_of)
    memory_io.tables[memory_io.part("pca_hashes", 0)] = first
    assert hash_table(memory_io, 0, "pca_hash")["pca_hash"].to_pylist() == codes
    assert hash_table(memory_io, 0, "phash")["phash"].to_pylist() == list(range(8))


@pytest.mark.parametrize("num", [0, 1, 3])
def test_a_pool_of_few_or_blank_pictures_is_fitted_with_photographs_that_are_installed(
    memory_io: Any, num: int
) -> None:
    looked_at(memory_io, 0, [*crops(num, seed=5), *[np.full((20, 20, 3), 7, np.uint8)] * 2])
    fit = table_to_arrays(fitted(memory_io))
    assert fit["axes"].shape == (1024, NUM_BITS)
    assert all(np.isfinite(array).all() for array in fit.values())
    codes = hashed(memory_io, 0)["pca_hash"].to_pylist()
    assert codes[num:] == [None, None]
    assert None not in codes[:num]
    assert len(set(codes)) == num + 1


def test_where_another_hash_is_asked_for_nothing_is_made(memory_io: Any) -> None:
    looked_at(memory_io, 0, crops(2))
    assert fitted(memory_io, hash_name="phash").num_rows == 0
    stage = PcaHashes(CONFIG, "phash")
    assert stage.after is None
    assert PcaHashes(CONFIG, "pca_hash").after == "safety"
    table = stage.run(0, replace(memory_io, shard=0, rows=None))["pca_hashes"]
    assert table.schema.equals(TABLES["pca_hashes"].schema)
    assert table.num_rows == 0


def test_folders_tell_settings_and_fits_apart(memory_io: Any) -> None:
    def folders(config: PcaHashConfig, hash_name: str) -> tuple[str, str]:
        return (
            FitPcaHash(config, hash_name).folder("fit_pca_hash", memory_io),
            PcaHashes(config, hash_name).folder("pca_hashes", memory_io),
        )

    asked, other, none = (
        folders(CONFIG, "pca_hash"),
        folders(PcaHashConfig(fit_pictures=9), "pca_hash"),
        folders(CONFIG, "phash"),
    )
    assert asked[0].startswith("fits/fit_pca_hash/grey32-")
    assert asked[1].startswith("pca_hashes/grey32-")
    assert none[1].startswith("pca_hashes/none-")
    assert len({*asked, *other, *none}) == 6
    assert none == folders(PcaHashConfig(fit_pictures=9), "dhash")
