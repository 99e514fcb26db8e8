"""Hashes of pictures: of pixels exactly, and of how they look (pHash, dHash) equal to imagehash's, bit for bit."""

from __future__ import annotations

import hashlib

import numpy as np


def pixel_sha256(rgb: np.ndarray) -> str:
    """sha256 of the shape and the bytes of uint8 [H, W, 3], hex: equal where the decoded pictures are."""
    digest = hashlib.sha256(str(rgb.shape).encode())
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def luma(rgb: np.ndarray) -> np.ndarray:
    """Luma (ITU-R 601, Pillow's rounding, which imagehash uses) of uint8 [H, W, 3] as uint8 [H, W]."""
    from PIL import Image

    return np.asarray(Image.fromarray(rgb).convert("L"))


def phash(picture: np.ndarray) -> int:
    """``imagehash.phash`` of uint8 [H, W, 3] or its luma [H, W], as 64 bits, its first bit the most significant one."""
    import imagehash
    from PIL import Image

    return _bits(imagehash.phash(Image.fromarray(picture)).hash)


def dhash(picture: np.ndarray) -> int:
    """``imagehash.dhash`` of uint8 [H, W, 3] or its luma [H, W], as 64 bits, its first bit the most significant one."""
    import imagehash
    from PIL import Image

    return _bits(imagehash.dhash(Image.fromarray(picture)).hash)


def luma_std(picture: np.ndarray) -> float:
    """Standard deviation of luma, 0 to 127, of uint8 [H, W, 3] or its luma [H, W]; near 0 is a blank picture.

    From the histogram: whole numbers, so no order of summing shows, and no float copy of a large picture.
    """
    from PIL import Image

    counts = np.array(Image.fromarray(picture).convert("L").histogram(), np.float64)
    levels = np.arange(256, dtype=np.float64)
    mean = (counts * levels).sum() / counts.sum()
    return float(np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum()))


def _bits(hash_bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(np.asarray(hash_bits, bool).ravel()).tobytes(), "big")
