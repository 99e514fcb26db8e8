"""The compiled loops of k-means. Numba takes half a second to import, so whoever needs one imports it there."""

from __future__ import annotations

import numba
import numpy as np

_CHUNK = 64  # scores whose greatest is looked at first
# Sums of products of fp16 values are exact, so their order is free; scores are finite.
_EXACT = {"reassoc", "contract", "nsz", "nnan"}


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def widen(bits: np.ndarray, wide: np.ndarray, wide_bits: np.ndarray) -> None:
    """float32 [N] of finite fp16 values, given as uint16 [N]; numpy takes twice as long."""
    for n in range(len(bits)):
        wide_bits[n] = np.uint32(bits[n] & 0x7FFF) << np.uint32(13)
    for n in range(len(bits)):
        wide[n] *= np.float32(2.0**112)  # the exponent of fp32 counts from another number; subnormal values come right
    for n in range(len(bits)):
        wide_bits[n] |= np.uint32(bits[n] & 0x8000) << np.uint32(16)


@numba.njit(nogil=True, cache=True, fastmath=_EXACT)  # type: ignore[untyped-decorator]
def settle(
    scores: np.ndarray, vectors: np.ndarray, centroids: np.ndarray, margin: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of the centroids within two margins of the best score of a row, the exactly nearest; how many were scored."""
    num_scored = 0
    num_rows, num = scores.shape
    dim = vectors.shape[1]
    cluster, similarity = np.empty(num_rows, np.int32), np.empty(num_rows, np.float32)
    num_whole = num // _CHUNK
    tops = np.empty(num_whole + 1, np.float32)
    tops[num_whole] = np.inf  # what the last chunk lacks to be whole is looked through in any case
    for row in range(num_rows):
        line = scores[row]
        best = np.float32(-np.inf)
        for chunk in range(num_whole):
            top = line[chunk * _CHUNK]
            for k in range(_CHUNK):
                top = max(top, line[chunk * _CHUNK + k])
            tops[chunk] = top
            best = max(best, top)
        for k in range(num_whole * _CHUNK, num):
            best = max(best, line[k])
        floor = np.float32(best - 2 * margin)
        found, highest = -1, np.float32(0)
        for chunk in range(num_whole + 1):
            if tops[chunk] < floor:
                continue
            for k in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, num)):
                if line[k] < floor:
                    continue
                num_scored += 1
                total = 0.0
                for d in range(dim):
                    total += np.float64(vectors[row, d]) * np.float64(centroids[k, d])
                exact = np.float32(total)
                if found < 0 or exact > highest:
                    found, highest = k, exact
        cluster[row], similarity[row] = found, highest
    return cluster, similarity, num_scored


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def drawn(distance: np.ndarray, draw: float) -> int:
    """The row that a draw in [0, 1) falls on, by distance; -1 where all distances are 0. Sums go row by row."""
    total = 0.0
    for row in range(len(distance)):
        total += distance[row]
    left, last = draw * total, -1
    for row in range(len(distance)):
        if distance[row] > 0:
            last = row
            left -= distance[row]
            if left < 0:
                break
    return last


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def squares(rows: np.ndarray) -> np.ndarray:
    """Sum of the squares of each row, float64 [N]; added one after the other, so the same on every processor."""
    sums = np.zeros(len(rows), np.float64)
    for row in range(len(rows)):
        for d in range(rows.shape[1]):
            sums[row] += np.float64(rows[row, d]) * np.float64(rows[row, d])
    return sums


@numba.njit(nogil=True, cache=True, fastmath=_EXACT)  # type: ignore[untyped-decorator]
def come_nearer(vectors: np.ndarray, norms: np.ndarray, centre: int, distance: np.ndarray) -> None:
    """Lower the squared distances of all vectors to that from a new centre, one of them; equal vectors are 0 apart."""
    for row in range(len(vectors)):
        total = 0.0
        for d in range(vectors.shape[1]):
            total += np.float64(vectors[row, d]) * np.float64(vectors[centre, d])
        distance[row] = min(distance[row], norms[row] + norms[centre] - 2 * total)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def add(vectors: np.ndarray, cluster: np.ndarray, total: np.ndarray, count: np.ndarray) -> None:
    """Add vectors, float32 [N, D], to the sums of their clusters, float64 [K, D], and count them, int64 [K]."""
    for row in range(len(vectors)):
        count[cluster[row]] += 1
        for d in range(vectors.shape[1]):
            total[cluster[row], d] += vectors[row, d]


@numba.njit(nogil=True, cache=True, fastmath=_EXACT)  # type: ignore[untyped-decorator]
def find_before(
    scores: np.ndarray,
    left: tuple[np.ndarray, np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray, np.ndarray],
    margin: float,
    found: tuple[np.ndarray, np.ndarray],
) -> None:
    """Of each row the column of a lower rank with the highest exact cosine above the one found so far, in place.

    Args:
        scores: products of the vectors, off by less than the margin, float32 [R, C].
        left: vectors, float32 [R, D], their lengths, float64 [R], and ranks, int64 [R], of the rows.
        right: the same of the columns, by rank.
        margin: of unit vectors.
        found: highest cosine, float32, and rank of the other, int64, by rank; equal cosines go to the least.
    """
    best, best_rank = found
    vectors, lengths, ranks = left
    others, other_lengths, other_ranks = right
    for row in range(len(ranks)):
        rank = ranks[row]
        for column in range(len(other_ranks)):
            if other_ranks[column] >= rank:
                break
            length = lengths[row] * other_lengths[column]
            if scores[row, column] < (best[rank] - margin) * length:
                continue
            total = 0.0
            for d in range(vectors.shape[1]):
                total += np.float64(vectors[row, d]) * np.float64(others[column, d])
            exact = np.float32(total / max(length, 1e-12))
            if exact > best[rank] or (exact == best[rank] and other_ranks[column] < best_rank[rank]):
                best[rank], best_rank[rank] = exact, other_ranks[column]
            if exact >= 1:  # nothing is more similar, and what is as similar comes later
                break
