"""Spherical k-means whose result is the same on any processor, with any number of workers.

Vectors are fp16 values of about unit length; so are the centroids after each iteration. Who is nearest is decided by
exact similarities (``curation/represent/nearest.py``) and sums of fp16 values are exact in fp64, so the parts in which
a sample is gone through leave no trace.
"""

from __future__ import annotations

import heapq

import numpy as np

from curation.represent.nearest import Centroids, Device, Nearest, Precision

_BLOCK_PAIRS = 1 << 12  # pairs scored exactly at once; 40 MiB an array at D = 1280
_STARTS_PER_CLUSTER = 32  # vectors among which the start is drawn, ...
_START_PRODUCTS = 1 << 35  # ... as long as it takes no more multiplications than these
_SPLIT = 1 / 64  # how far the halves of a split cluster lie apart, relative to each coordinate


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of unit vectors [..., D] held as fp16 values, float32.

    A product of two fp16 values is a multiple of 2^-48, so that fp64 sums them without rounding, in whatever order.
    """
    return np.asarray((a.astype(np.float64) * b.astype(np.float64)).sum(axis=-1), np.float32)


def similarities(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """``similarity`` of rows ``i`` of ``a`` [N, D] and rows ``j`` of ``b`` [M, D], float32 [P], a block at a time."""
    found = np.empty(len(i), np.float32)
    for start in range(0, len(i), _BLOCK_PAIRS):
        block = slice(start, start + _BLOCK_PAIRS)
        found[block] = similarity(a[i[block]], b[j[block]])
    return found


def assign(vectors: np.ndarray, centroids: np.ndarray, *, device: Device = "cpu") -> Nearest:
    """Nearest centroid of each vector, and the similarity to it; ties go to the least number.

    Args:
        vectors: fp16 values, [N, D].
        centroids: fp16 values, [K, D], K >= 1.
        device: cpu or cuda; changes no byte.
    """
    return Centroids(centroids, device=device).of(vectors)


# The start


def start_rows(num_vectors: int, *, num_clusters: int, dim: int, seed: int) -> np.ndarray:
    """Places of the vectors among which the start is drawn, ascending, int64: a seeded sample.

    Args:
        num_vectors: of the whole sample.
        num_clusters: that are to be made, at most ``num_vectors``.
        dim: of a vector.
        seed: of the draw.
    """
    affordable = min(_STARTS_PER_CLUSTER * num_clusters, _START_PRODUCTS // (num_clusters * dim))
    num = min(num_vectors, max(num_clusters, affordable))
    return np.asarray(np.sort(np.random.default_rng(seed).choice(num_vectors, num, replace=False, shuffle=False)))


def start(vectors: np.ndarray, *, num_clusters: int, seed: int) -> np.ndarray:
    """Centroids to begin with: k-means++ (Arthur and Vassilvitskii, 2007).

    Args:
        vectors: fp16 values, [S, D].
        num_clusters: at most S.
        seed: of the draws.

    Returns:
        float16 [K, D], rows of ``vectors``.
    """
    if num_clusters == len(vectors):
        return np.asarray(vectors, np.float16)
    held = np.ascontiguousarray(vectors, np.float32)
    return np.asarray(held[_spread(held, np.random.default_rng(seed).random(num_clusters))], np.float16)


def _spread(vectors: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Rows of k-means++, one for each draw in [0, 1), int64 [K]."""
    from curation.represent import loops

    norms, distance = loops.squares(vectors), np.full(len(vectors), 4.0)
    chosen: list[int] = []
    for draw in draws:
        row = loops.drawn(distance, draw)
        if row < 0:  # every vector is one of those chosen: the first others fill up
            others = np.setdiff1d(np.arange(len(vectors)), chosen)
            return np.array([*chosen, *others[: len(draws) - len(chosen)]], np.int64)
        chosen.append(row)
        loops.come_nearer(vectors, norms, row, distance)
    return np.array(chosen, np.int64)


# An iteration


class Sums:
    """What an iteration adds up, of each cluster: the vectors that are nearest to it, and their number.

    Sums of fp16 values are exact in fp64 up to 2^29 vectors a cluster, so that any two orders and cuts give the same.
    """

    def __init__(self, num_clusters: int, dim: int) -> None:
        self.total = np.zeros((num_clusters, dim), np.float64)
        self.count = np.zeros(num_clusters, np.int64)

    def add(self, vectors: np.ndarray, centroids: Centroids) -> None:
        """Add vectors, fp16 values, [N, D], each to the nearest centroid."""
        from curation.represent import loops

        for block, nearest in centroids.blocks(vectors):
            loops.add(block, nearest.cluster, self.total, self.count)


def directions(centroids: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Unit vectors in the direction of the sums of some clusters; one without a direction stays where it was.

    Args:
        centroids: as they were, fp16 values, [K, D].
        total: sum of the vectors of each, float64 [K, D].

    Returns:
        float16 [K, D].
    """
    from curation.represent import loops

    norm = np.sqrt(loops.squares(total))[:, None]
    there = norm > 0
    return np.where(there, total / np.where(there, norm, 1.0), centroids.astype(np.float64)).astype(np.float16)


def split(centroids: np.ndarray, count: np.ndarray) -> None:
    """Give each empty cluster half of the largest one, in place: both move a little to either side of it (Faiss).

    Args:
        centroids: float16 [K, D].
        count: vectors of each cluster, int64 [K].
    """
    sizes = [(-int(size), cluster) for cluster, size in enumerate(count) if size >= 2]
    heapq.heapify(sizes)
    sign = np.where(np.arange(centroids.shape[1]) % 2 == 0, 1 + _SPLIT, 1 - _SPLIT)
    for empty in np.flatnonzero(count == 0).tolist():
        if not sizes or sizes[0][0] > -2:
            return
        size, donor = heapq.heappop(sizes)
        whole = centroids[donor].astype(np.float64)
        for cluster, half in ((empty, whole * sign), (donor, whole * (2 - sign))):
            centroids[cluster] = half / np.sqrt(np.add.accumulate(half * half)[-1])
        heapq.heappush(sizes, (size + -size // 2, donor))
        heapq.heappush(sizes, (-(-size // 2), empty))


def fit(
    vectors: np.ndarray,
    *,
    num_clusters: int,
    iterations: int,
    seed: int,
    precision: Precision | None = None,
    device: Device = "cpu",
) -> np.ndarray:
    """Spherical k-means of vectors that fit into memory; the stage ``fit_kmeans`` does the same piece by piece.

    Args:
        vectors: fp16 values of about unit length, [N, D].
        num_clusters: at most N are made.
        iterations: of Lloyd's algorithm; fewer where nothing moves any more.
        seed: of the start.
        precision: of the GEMM that proposes; None takes the faster. It changes no byte.
        device: cpu or cuda; changes no byte.

    Returns:
        Centroids, float32 [K, D], about unit length, exact in fp16 so that similarities to them are exact too.
    """
    num, dim = vectors.shape
    num_clusters = min(num_clusters, num)
    rows = start_rows(num, num_clusters=num_clusters, dim=dim, seed=seed)
    centroids = start(vectors[rows], num_clusters=num_clusters, seed=seed)
    for _ in range(iterations):
        sums = Sums(num_clusters, dim)
        sums.add(vectors, Centroids(centroids, precision=precision, device=device))
        before, centroids = centroids, directions(centroids, sums.total)
        split(centroids, sums.count)
        if np.array_equal(before, centroids):
            break
    return centroids.astype(np.float32)
