"""Hashes of pictures: of pixels exactly, and of how they look: pHash and dHash equal to imagehash's, PDQ to Meta's.

PDQ is text of 64 hex digits, as block lists, `lvd explain` and other programs have it: it can be read, looked up and
joined in pandas and SQL, and compressed it takes hardly more than its 32 bytes. Distances need ``pdq_words``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

PDQ_BITS = 256
PDQ_RADIUS_BITS = 31  # at which the authors of PDQ call two pictures the same
PDQ_MIN_QUALITY = 50  # below it they do not trust the hash: a flat picture is like any other
_PDQ_SIDE_PX = 1024
_PAIRS_AT_ONCE = 1 << 20  # of hashes: some 8 MB


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


def pdq(rgb: np.ndarray) -> tuple[str, int]:
    """PDQ of uint8 [H, W, 3] as 64 hex digits, its first bit the most significant one, and its quality, 0 to 100.

    That of the wheel ``pdqhash``, which is Meta's reference code (ThreatExchange), on the whole picture: 2 to 3 ms
    a photograph of 500 px, a tenth of look. A thumbnail would cost a third and move 6 of the 256 bits in the median
    and 18 at most (288 px), 16 and 44 (160 px): too much beside a radius of 31. Sides from 2,048 px on are averaged
    over whole pixels to at least 1,024 px first, which moved at most 6 bits in 60 photographs and bounds memory.
    """
    import pdqhash
    from PIL import Image

    height, width = rgb.shape[:2]
    blocks = max(1, width // _PDQ_SIDE_PX), max(1, height // _PDQ_SIDE_PX)
    if blocks != (1, 1):
        rgb = np.asarray(Image.fromarray(rgb).reduce(blocks))
    bits, quality = pdqhash.compute(rgb)
    return np.packbits(bits.astype(bool)).tobytes().hex(), int(quality)


def pdq_words(hashes: Sequence[str | None]) -> np.ndarray:
    """PDQ hashes in hex as bits to compare, uint64 [N, 4]; zeros for None."""
    text = "".join(one or "0" * (PDQ_BITS // 4) for one in hashes)
    return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64).reshape(-1, PDQ_BITS // 64)


def pdq_distance(words: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bits that differ: uint64 [..., 4] and [..., 4], broadcast, to int16 [...]."""
    return np.asarray(np.bitwise_count(words ^ other).sum(axis=-1, dtype=np.int16))


def pdq_nearest(words: np.ndarray, listed: np.ndarray, radius_bits: int) -> np.ndarray:
    """Distance of each hash to the nearest one of a list; 257 where none lies within the radius.

    Half of the bits first: what differs in more than the radius there is not looked at further.
    10,000 pictures against 10,000 entries take .3 s on one core.

    Args:
        words: uint64 [N, 4].
        listed: uint64 [M, 4].
        radius_bits: largest distance.

    Returns:
        int16 [N].
    """
    best = np.full(len(words), PDQ_BITS + 1, np.int16)
    step = max(1, _PAIRS_AT_ONCE // max(1, len(words)))
    for start in range(0, len(listed), step):
        block = listed[start : start + step]
        half = np.bitwise_count(words[:, None, 0] ^ block[:, 0])
        half += np.bitwise_count(words[:, None, 1] ^ block[:, 1])
        mine, theirs = np.nonzero(half <= radius_bits)
        distance = pdq_distance(words[mine], block[theirs])
        within = distance <= radius_bits
        np.minimum.at(best, mine[within], distance[within])
    return best


def flat_share(picture: np.ndarray) -> float:
    """Largest share of pixels whose luma lies within one grey level of one, of uint8 [H, W, 3] or its luma [H, W].

    Near 1 is lettering or a symbol on one colour, as servers send in place of a picture.
    """
    from PIL import Image

    counts = np.array(Image.fromarray(picture).convert("L").histogram(), np.int64)
    return float(np.convolve(counts, [1, 1, 1]).max() / counts.sum())


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
