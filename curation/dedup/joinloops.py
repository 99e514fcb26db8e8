"""The compiled loops of the join. Numba takes half a second to import, so whoever needs one imports it there."""

from __future__ import annotations

import numba
import numpy as np

_CHUNK = 256  # scores whose greatest is looked at first
# Sums of products of fp16 values are exact, so their order is free; scores are finite.
_EXACT = {"reassoc", "contract", "nsz", "nnan"}


@numba.njit(nogil=True, cache=True, fastmath=_EXACT, inline="always")  # type: ignore[untyped-decorator]
def _reaches(scores: np.ndarray, floor: float) -> bool:
    """Whether any of the scores reaches the floor."""
    top = scores[0]
    for k in range(len(scores)):
        top = max(top, scores[k])
    return bool(top >= floor)


@numba.njit(nogil=True, cache=True, fastmath=_EXACT)  # type: ignore[untyped-decorator]
def at_least(scores: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Row and column, int64 [P], of each of the scores [R, C] from the floor on, row by row."""
    num_rows, num = scores.shape
    total = 0
    for row in range(num_rows):
        for first in range(0, num, _CHUNK):
            chunk = scores[row, first : first + _CHUNK]
            if _reaches(chunk, floor):
                for k in range(len(chunk)):
                    total += chunk[k] >= floor
    rows, columns = np.empty(total, np.int64), np.empty(total, np.int64)
    if total == 0:
        return rows, columns
    at = 0
    for row in range(num_rows):
        for first in range(0, num, _CHUNK):
            chunk = scores[row, first : first + _CHUNK]
            if _reaches(chunk, floor):
                for k in range(len(chunk)):
                    if chunk[k] >= floor:
                        rows[at], columns[at] = row, first + k
                        at += 1
    return rows, columns


@numba.njit(nogil=True, cache=True, fastmath=_EXACT)  # type: ignore[untyped-decorator]
def cosines(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray, found: np.ndarray) -> None:
    """Exact cosine of rows ``i`` of ``a`` and rows ``j`` of ``b``, fp16 values held as float32; into float32 [P]."""
    for n in range(len(i)):
        dot, left, right = 0.0, 0.0, 0.0
        for d in range(a.shape[1]):
            x, y = np.float64(a[i[n], d]), np.float64(b[j[n], d])
            dot += x * y
            left += x * x
            right += y * y
        found[n] = np.float32(dot / max(np.sqrt(left) * np.sqrt(right), 1e-12))


@numba.njit(nogil=True, cache=True, fastmath=_EXACT)  # type: ignore[untyped-decorator]
def nearest_first(
    scores: np.ndarray, floors: np.ndarray, vectors: np.ndarray, centroids: np.ndarray, probes: np.ndarray
) -> int:
    """The exactly nearest centroids of each row among those whose score reaches its floor; how many were scored.

    Args:
        scores: float32 [R, L].
        floors: float32 [R]; at least P centroids of each row reach them.
        vectors: fp16 values, float32 [R, D].
        centroids: the same, [L, D].
        probes: int32 [R, P], written; equal ones go by the lower number.
    """
    num_scored = 0
    num_probes = probes.shape[1]
    best = np.empty(num_probes, np.float64)
    for row in range(len(scores)):
        found = 0
        for k in range(scores.shape[1]):
            if scores[row, k] < floors[row]:
                continue
            num_scored += 1
            exact = 0.0
            for d in range(vectors.shape[1]):
                exact += np.float64(vectors[row, d]) * np.float64(centroids[k, d])
            if found < num_probes:
                found += 1
            elif exact <= best[num_probes - 1]:
                continue
            at = found - 1
            while at > 0 and best[at - 1] < exact:
                best[at], probes[row, at] = best[at - 1], probes[row, at - 1]
                at -= 1
            best[at], probes[row, at] = exact, k
    return num_scored
