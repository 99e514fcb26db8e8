"""k-means over unit vectors: a fit on a sample (Faiss), and an assignment whose every row is the same in any batch."""

from __future__ import annotations

import numpy as np

_CANDIDATES = 4
MARGIN = 1e-4  # fp32 GEMM of unit vectors is off by less
_BLOCK_SCORES = 1 << 24  # similarities held at once; 64 MiB
_BLOCK_PAIRS = 1 << 12  # pairs scored exactly at once; 40 MiB an array at D = 1280


def fit(vectors: np.ndarray, *, num_clusters: int, iterations: int, seed: int) -> np.ndarray:
    """Spherical k-means.

    Args:
        vectors: float32 [N, D], unit length.
        num_clusters: at most N are made.
        iterations: of Lloyd's algorithm.
        seed: of the start.

    Returns:
        Centroids, float32 [K, D], unit length, exact in fp16 so that similarities to them are exact too.
    """
    import faiss

    faiss.omp_set_num_threads(1)  # sums in one order
    num_clusters = min(num_clusters, len(vectors))
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        num_clusters,
        niter=iterations,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 30,
    )
    kmeans.train(np.ascontiguousarray(vectors, np.float32))
    return np.asarray(kmeans.centroids, np.float16).astype(np.float32)


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


def assign(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each vector; ties go to the least number.

    A blocked GEMM proposes, exact similarities decide: no row depends on the others.

    Args:
        vectors: float32 [N, D], fp16 values.
        centroids: float32 [K, D], fp16 values, K >= 1.

    Returns:
        cluster, int32 [N], and similarity to it, float32 [N].
    """
    clusters = np.zeros(len(vectors), np.int32)
    best = np.zeros(len(vectors), np.float32)
    num = min(_CANDIDATES, len(centroids))
    num_rows = max(1, _BLOCK_SCORES // len(centroids))
    for start in range(0, len(vectors), num_rows):
        block = vectors[start : start + num_rows]
        scores = block @ centroids.T
        candidates = np.sort(np.argpartition(-scores, num - 1, axis=1)[:, :num], axis=1)
        rows = np.arange(len(block))
        exact = similarities(block, centroids, np.repeat(rows, num), candidates.ravel()).reshape(-1, num)
        pick = exact.argmax(axis=1)
        clusters[start : start + len(block)] = candidates[rows, pick]
        best[start : start + len(block)] = exact[rows, pick]
        worst = np.take_along_axis(scores, candidates, axis=1).min(axis=1)
        for row in np.flatnonzero((worst > exact.max(axis=1) - MARGIN) & (num < len(centroids))):
            full = similarities(block, centroids, np.full(len(centroids), row), np.arange(len(centroids)))
            clusters[start + row], best[start + row] = full.argmax(), full.max()
    return clusters, best
