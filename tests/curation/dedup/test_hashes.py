import tarfile

import imagehash
import numpy as np
from PIL import Image
from scipy.fft import dct
from skimage import data

from curation.dedup.hashes import dhash, hamming, luma_std, phash, pixel_sha256
from training.data.pixels import DecodeError, decode


def as_int(value: imagehash.ImageHash) -> int:
    return int(str(value), 16)


def phash_by_hand(rgb: np.ndarray) -> int:
    """The published algorithm, without imagehash: 32 x 32 grey, DCT-II, low 8 x 8, above the median."""
    grey = np.asarray(Image.fromarray(rgb).convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = dct(dct(grey, axis=0), axis=1)[:8, :8]
    return int("".join("01"[int(bit)] for bit in (low > np.median(low)).ravel()), 2)


def test_hashes_equal_imagehash_on_installed_photographs():
    for rgb in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket()):
        image = Image.fromarray(rgb)
        assert phash(rgb) == as_int(imagehash.phash(image)) == phash_by_hand(rgb)
        assert dhash(rgb) == as_int(imagehash.dhash(image))


def test_hashes_equal_imagehash_on_real_pictures(shared_data):
    num_pictures = 0
    with tarfile.open(shared_data / "pool_caltech_background_80.tar") as tar:
        for member in tar:
            if member.name == "manifest.csv":
                continue
            body = tar.extractfile(member).read()
            try:
                rgb = decode(body).rgb
            except DecodeError:
                continue
            image = Image.open(tar.extractfile(member))
            assert phash(rgb) == as_int(imagehash.phash(image))
            assert dhash(rgb) == as_int(imagehash.dhash(image))
            num_pictures += 1
    assert num_pictures >= 75


def test_hamming_counts_bits():
    a = np.array([0, 0xFFFF, 2**64 - 1], np.uint64)
    assert hamming(a, np.uint64(0)).tolist() == [0, 16, 64]


def test_pixel_sha256_knows_shape_and_bytes():
    rgb = data.chelsea()
    assert pixel_sha256(rgb) == pixel_sha256(rgb.copy())
    assert pixel_sha256(rgb) != pixel_sha256(rgb.reshape(rgb.shape[1], rgb.shape[0], 3))


def test_a_blank_picture_has_no_spread():
    assert luma_std(np.full((10, 10, 3), 77, np.uint8)) == 0
    assert luma_std(data.chelsea()) > 20
