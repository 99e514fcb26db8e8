"""Hashes: equal to imagehash's bit for bit, and to an oracle that shares no code with it."""

import io
import tarfile

import imagehash
import numpy as np
import pdqhash
import pytest
from PIL import Image

from curation.dedup.hashes import (
    PDQ_BITS,
    dhash,
    flat_share,
    luma,
    luma_std,
    pdq,
    pdq_distance,
    pdq_nearest,
    pdq_words,
    phash,
    pixel_sha256,
)


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    from skimage import data

    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.camera(), data.coins()]
    return [p if p.ndim == 3 else np.repeat(p[:, :, None], 3, axis=2) for p in pictures]


def oracle_phash(rgb: np.ndarray) -> int:
    """pHash by its definition: a 32 x 32 DCT-II by matrix products, its 8 x 8 low corner against the median."""
    grey = np.asarray(Image.fromarray(rgb).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    k, n = np.mgrid[0:32, 0:32]
    basis = 2 * np.cos(np.pi * k * (2 * n + 1) / 64)
    low = (basis @ grey @ basis.T)[:8, :8]
    value = 0
    for bit in (low > np.median(low)).ravel():
        value = value * 2 + int(bit)
    return value


def oracle_dhash(rgb: np.ndarray) -> int:
    grey = np.asarray(Image.fromarray(rgb).convert("L").resize((9, 8), Image.Resampling.LANCZOS)).astype(int)
    value = 0
    for y in range(8):
        for x in range(8):
            value = value * 2 + int(grey[y, x + 1] > grey[y, x])
    return value


def test_equal_to_imagehash_and_to_the_oracle(photos) -> None:
    for rgb in photos:
        image = Image.fromarray(rgb)
        assert phash(rgb) == int(str(imagehash.phash(image)), 16) == oracle_phash(rgb)
        assert dhash(rgb) == int(str(imagehash.dhash(image)), 16) == oracle_dhash(rgb)
        assert phash(luma(rgb)) == phash(rgb)
        assert dhash(luma(rgb)) == dhash(rgb)


def test_equal_on_real_photos(shared_data) -> None:
    checked = 0
    for name in ("pool_imagenet_300.tar", "pool_coco_48.tar"):
        with tarfile.open(shared_data / name) as tar:
            for member in [m for m in tar.getmembers() if not m.name.endswith(".csv")][::10]:
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                rgb = np.asarray(image)
                assert phash(rgb) == int(str(imagehash.phash(image)), 16) == oracle_phash(rgb)
                assert dhash(rgb) == int(str(imagehash.dhash(image)), 16) == oracle_dhash(rgb)
                checked += 1
    assert checked >= 30


def test_the_first_bit_is_the_most_significant_one() -> None:
    ramp = np.repeat(np.arange(0, 250, dtype=np.uint8)[None, :, None], 100, axis=0).repeat(3, axis=2)
    assert dhash(ramp) == 2**64 - 1
    half = ramp.copy()
    half[50:] = ramp[50:, ::-1]
    assert dhash(half) == 0xFFFFFFFF00000000


def test_any_shape_has_hashes() -> None:
    for shape in ((1, 1, 3), (1, 500, 3), (300, 1, 3)):
        rgb = np.full(shape, 7, np.uint8)
        assert 0 <= phash(rgb) < 2**64
        assert dhash(rgb) == 0
        assert luma_std(rgb) == 0.0


def test_pixel_sha256_tells_pixels_and_shape() -> None:
    rgb = np.arange(2 * 6 * 3, dtype=np.uint8).reshape(2, 6, 3)
    assert pixel_sha256(rgb) == pixel_sha256(np.asfortranarray(rgb))
    assert pixel_sha256(rgb) != pixel_sha256(rgb.reshape(3, 4, 3))
    changed = rgb.copy()
    changed[1, 5, 2] ^= 1
    assert pixel_sha256(rgb) != pixel_sha256(changed)
    assert len(pixel_sha256(rgb)) == 64


def test_luma_std_equals_numpys(photos) -> None:
    for rgb in photos:
        assert luma_std(rgb) == pytest.approx(luma(rgb).std(), abs=1e-9)
    half = np.zeros((10, 10, 3), np.uint8)
    half[:5] = 255
    assert luma_std(half) == 127.5


def test_flat_share_counts_one_luma_and_its_neighbours() -> None:
    assert flat_share(np.full((4, 5, 3), 9, np.uint8)) == 1.0
    levels = np.repeat(np.array([10, 11, 13, 200], np.uint8), [5, 4, 6, 5])
    assert flat_share(levels.reshape(4, 5)) == 10 / 20  # around 12
    assert flat_share(np.array([[255, 254, 0, 100]], np.uint8)) == 0.5


# Of Meta's reference code (facebook/ThreatExchange), as its own tests and tools print them.
PUBLISHED_PDQ = {
    "bridge-mods_aaa-orig": ("f8f8f0cee0f4a84f06370a22038f63f0b36e2ed596621e1d33e6b39c4e9c9b22", 0),
    "bridge-mods_blur-a-little": ("f8f8f0cee0f4a84f06370a2a038f63f0b36e26d596621e1d33e6b39c4e9c9b22", 0),
    "bridge-mods_blur-a-lot": ("f8f8f0cee0f4a84f0637022a038f67f0b36e26d596621e1d33e6b39c4e9c9b22", 0),
    "dih_bridge-2-rotate-90": ("30a10efd71cc3d429013d48d0ffffc52e34e0e17ada952a9d29685211ea9e5af", 0),
    "labelme_q0003": ("54a977c221d14c1c43ba5e6e21d4a13989a3553f1462611cbb85fda7be83b677", 10),  # of quality 3
    "labelme_q0004": ("992d44af36d69e6ca6b812585928bac11def254ef5398c6d07466c9abcc65b92", 0),
    "labelme_q0122": ("cfb2009ddd21c6dab0046a7745b5984757a8a4535b3377aea2591d32b33ff940", 0),
    "labelme_q0291": ("a0fe94f1e5cc1cc8dd855948498dc9243f7ca27336f036d7f212b74bc103c9a7", 0),
    "labelme_q0746": ("1049d96239e24d4dca2c55512b8bdb77425f4dbcf575a0a95555aaab5554aaaa", 0),
}


def bits_apart(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def test_pdq_equals_the_published_hashes_and_the_copies_lie_within_its_radius(shared_data) -> None:
    found = {}
    with tarfile.open(shared_data / "copies_pdq_imagededup.tar") as tar:
        for member in tar.getmembers():
            if member.name.startswith("pdq_"):
                picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                found[member.name.removeprefix("pdq_").removesuffix(".jpg")] = pdq(np.asarray(picture))
    for name, (published, most_bits) in PUBLISHED_PDQ.items():
        assert bits_apart(found[name][0], published) <= most_bits, name
    original = found["bridge-mods_aaa-orig"][0]
    for name, (text, quality) in found.items():
        if name.startswith("bridge-mods"):
            assert (quality, bits_apart(text, original) <= 16) == (100, True), name
        else:
            assert bits_apart(text, original) > 100, name
    assert (found["labelme_q0003"][1], found["labelme_q0004"][1]) == (3, 4)


def test_pdq_is_that_of_the_whole_picture_and_of_a_large_one_nearly(photos) -> None:
    for rgb in photos:
        bits, quality = pdqhash.compute(rgb)
        assert pdq(rgb) == (f"{int(''.join(str(bit) for bit in bits), 2):064x}", quality)
    large = np.asarray(Image.fromarray(photos[0]).resize((3100, 2050), Image.Resampling.BICUBIC))
    bits, quality = pdqhash.compute(large)
    text, of_reduced = pdq(large)
    assert bits_apart(text, f"{int(''.join(str(bit) for bit in bits), 2):064x}") <= 6
    assert of_reduced == quality == 100


def test_any_shape_has_a_pdq_and_one_colour_tells_nothing() -> None:
    for shape in ((1, 1, 3), (1, 500, 3), (300, 1, 3), (3, 65_500, 3), (64, 64, 3)):
        text, quality = pdq(np.full(shape, 7, np.uint8))
        assert (len(text), quality) == (64, 0)


def test_pdq_distances_equal_those_of_whole_numbers() -> None:
    draw = np.random.default_rng(5)
    base = [draw.bytes(32).hex() for _ in range(40)]
    near = [
        f"{int(text, 16) ^ sum(1 << int(bit) for bit in draw.choice(256, n, replace=False)):064x}"
        for n, text in enumerate(base)
    ]
    pictures, listed = [*near, base[0], "0" * 64], base[:30]
    assert pdq_words([*base, None]).shape == (41, 4)
    all_bits = np.array([[bits_apart(one, other) for other in listed] for one in pictures])
    words, others = pdq_words(pictures), pdq_words(listed)
    np.testing.assert_array_equal(pdq_distance(words[:, None], others), all_bits)
    for radius in (0, 5, 31, 64):
        expected = np.where(all_bits.min(1) <= radius, all_bits.min(1), PDQ_BITS + 1)
        np.testing.assert_array_equal(pdq_nearest(words, others, radius), expected)
    assert pdq_nearest(words, pdq_words([]), 31).tolist() == [257] * len(pictures)
    assert pdq_nearest(pdq_words([]), others, 31).tolist() == []


def test_pieces_of_a_long_list_change_nothing(monkeypatch) -> None:
    draw = np.random.default_rng(6)
    words, listed = (draw.integers(0, 2**64, (num, 4), dtype=np.uint64) for num in (9, 50))
    whole = pdq_nearest(words, listed, 120)
    monkeypatch.setattr("curation.dedup.hashes._PAIRS_AT_ONCE", 30)
    np.testing.assert_array_equal(pdq_nearest(words, listed, 120), whole)
