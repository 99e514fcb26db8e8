"""Hashes: equal to imagehash's bit for bit, and to an oracle that shares no code with it."""

import io
import tarfile

import imagehash
import numpy as np
import pytest
from PIL import Image

from curation.dedup.hashes import dhash, luma, luma_std, phash, pixel_sha256


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
