"""Vectors for knn.py: made ones with planted copies, and descriptors of pictures and of seeded edits of them.

    python tests/benchmarks/knn_vectors.py --data DIR --cache FILE

makes the descriptors alone, which takes about 12 CPU ms each; it goes on where it was stopped, and knn.py reads FILE.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import random
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import threadpoolctl
from PIL import Image

from curation.dedup.siftvlad import DCT_DIM, VLAD_DIM, VLAD_WEIGHT, SiftVladDct, fit_sift_vlad, unit

sys.path.insert(0, str(Path(__file__).parents[1]))

from copy_edits import EDITS

DIM = 512
ROWS = 200_000
PARQUETS = ("tiny_imagenet_100c", "cifar10_jpg_22k")
TARS = ("pool_imagenet_300", "pool_coco_48", "pool_caltech_background_80")
FIT_PICTURES, WORKERS, BLOCK = 2000, 2, 500
LATENT, PICTURES_PER_CENTRE, SPREAD, NOISE = 128, 20, 1.5, 1.0
FARTHEST_COPY = 0.4  # cosine


def made_vectors(num: int) -> np.ndarray:
    """Unit vectors around centres; a fifth are copies of others, at cosines of 0.4 to 0.99.

    The centres lie in 128 dimensions, and noise in all. Two vectors of one centre have a cosine of 0.3 on average.

    Returns:
        fp16 values, float32 [N, 512].
    """
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((max(1, num // PICTURES_PER_CENTRE), LATENT), np.float32)
    latent = centres[draw.integers(0, len(centres), num)] + SPREAD * draw.standard_normal((num, LATENT), np.float32)
    lift = draw.standard_normal((LATENT, DIM), np.float32) / 7
    rows = unit(latent @ lift + NOISE * draw.standard_normal((num, DIM), np.float32))
    planted = num // 5
    cosine = draw.uniform(FARTHEST_COPY, 0.99, (planted, 1)).astype(np.float32)
    of = rows[planted : 2 * planted]
    aside = draw.standard_normal((planted, DIM), np.float32)
    aside = unit(aside - (aside * of).sum(1, keepdims=True) * of)
    rows[:planted] = cosine * of + np.sqrt(1 - cosine**2) * aside
    return rows.astype(np.float16).astype(np.float32)


def pictures_of(data: Path) -> list[bytes]:
    """Encoded pictures of the sets, shuffled."""
    found = [one for name in PARQUETS for one in pq.read_table(data / f"{name}.parquet")["image"].to_pylist()]
    for name in TARS:
        with tarfile.open(data / f"{name}.tar") as tar:
            manifest = tar.extractfile("manifest.csv")
            assert manifest is not None
            for row in csv.DictReader(io.TextIOWrapper(manifest)):
                member = tar.extractfile(row["file"])
                assert member is not None
                found.append(member.read())
    random.Random(0).shuffle(found)
    return found


def opened(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture)).convert("RGB")


def shortened(vector: np.ndarray) -> np.ndarray:
    """The leading 397 whitened axes of a descriptor and its DCT, at the descriptor's weights; float32 [512]."""
    local, low = vector[: DIM - DCT_DIM], vector[VLAD_DIM:]
    return unit(np.concatenate([np.sqrt(VLAD_WEIGHT) * unit(local), np.sqrt(1 - VLAD_WEIGHT) * unit(low)]))


_PICTURES: list[bytes] = []
_FIT: dict[str, np.ndarray] = {}  # both are there when the workers are forked


def _described(rows: np.ndarray) -> np.ndarray:
    """Vectors of rows of the set, float16 [R, 512].

    The first rows are the pictures as they are. Then comes an edit of each in the same order, then another one of each.
    """
    descriptor = SiftVladDct(_FIT)
    vectors = np.empty((len(rows), DIM), np.float16)
    for at, row in enumerate(rows.tolist()):
        turn, number = divmod(row, len(_PICTURES))
        picture = opened(_PICTURES[number])
        if turn > 0:
            draw = random.Random(number)
            edit = draw.sample(list(EDITS), len(EDITS))[turn - 1]
            other = opened(draw.choice(_PICTURES))
            picture = opened(EDITS[edit](picture, other, random.Random(row)))
        vectors[at] = shortened(descriptor.vector(np.asarray(picture)))
    return vectors


def described(data: Path, cache: Path, num: int) -> np.ndarray:
    """Descriptors of the pictures and of edits of them; those that the cache holds are not made again.

    Args:
        data: folder of the sets.
        cache: .npy, float16 [num, 512]; rows of zeros are not made yet.
        num: of rows.

    Returns:
        float32 [num, 512].
    """
    _PICTURES[:] = pictures_of(data)
    held = np.lib.format.open_memmap(cache, "r+" if cache.exists() else "w+", np.float16, (num, DIM))
    assert held.shape == (num, DIM), f"{cache} holds {held.shape}"
    missing = [rows for rows in np.split(np.arange(num), range(BLOCK, num, BLOCK)) if not held[rows].any(1).all()]
    if missing:
        _FIT.update(fit_sift_vlad([np.asarray(opened(one)) for one in _PICTURES[:FIT_PICTURES]], seed=0))
        limits = threadpoolctl.threadpool_limits
        with multiprocessing.get_context("fork").Pool(WORKERS, initializer=limits, initargs=(1,)) as workers:
            for rows, vectors in zip(missing, workers.imap(_described, missing), strict=True):
                held[rows] = vectors
                print(f"{rows[-1] + 1:,} of {num:,} vectors", flush=True)
        held.flush()
    return np.asarray(held, np.float32)


def held_rows(cache: Path) -> np.ndarray:
    """Rows of the cache up to the first that is missing, float32 [N, 512]."""
    held = np.load(cache, mmap_mode="r")
    there = held.any(1)
    return np.asarray(held[: len(held) if there.all() else int(there.argmin())], np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the picture sets")
    parser.add_argument("--cache", type=Path, required=True, help=".npy that is written")
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args()
    described(options.data, options.cache, options.rows)


if __name__ == "__main__":
    main()
