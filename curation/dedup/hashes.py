"""Hashes of pictures: of pixels exactly, and of how they look (pHash, dHash) equal to imagehash's, bit for bit."""

from __future__ import annotations

import hashlib

import numpy as np


def pixel_sha256(rgb: np.ndarray) -> str:
    """sha256 of the shape and the bytes of uint8 [H, W, 3], hex: equal where the decoded pictures are."""
    digest = hashlib.sha256(str(rgb.shape).encode())
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def phash(rgb: np.ndarray) -> int:
    """``imagehash.phash`` of uint8 [H, W, 3] as 64 bits, its first bit the most significant one."""
    import imagehash
    from PIL import Image

    return _bits(imagehash.phash(Image.fromarray(rgb)).hash)


def dhash(rgb: np.ndarray) -> int:
    """``imagehash.dhash`` of uint8 [H, W, 3] as 64 bits, its first bit the most significant one."""
    import imagehash
    from PIL import Image

    return _bits(imagehash.dhash(Image.fromarray(rgb)).hash)


def luma_std(rgb: np.ndarray) -> float:
    """Standard deviation of luma (ITU-R 601), 0 to 127; near 0 is a blank picture."""
    red, green, blue = (rgb[:, :, channel].astype(np.float32) for channel in range(3))
    return float(np.std(0.299 * red + 0.587 * green + 0.114 * blue, dtype=np.float64))


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Differing bits of uint64 arrays, elementwise with broadcasting, uint8."""
    return np.asarray(np.bitwise_count(np.bitwise_xor(a, b)), np.uint8)


def _bits(hash_bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(np.asarray(hash_bits, bool).ravel()).tobytes(), "big")
