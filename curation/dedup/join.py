"""The join of copy descriptors: who is near whom, list by list, scored exactly.

A coarse quantiser cuts the vectors into lists. Each picture has a home list and probes its nearest ones. A list joins
the pictures at home in it with all that probe it: one GEMM per pair of blocks, then each candidate is scored again from
the stored fp16 vectors. That score is exact: fp64 holds products and sums of fp16 numbers below 1 without rounding, so
no order of summation, block or machine can change it. Centroids are rounded to fp16 for the same reason: all tasks see
the same home for a picture, and each pair is written by one task.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

GEMM_MARGIN = 1e-3  # fp32 GEMM of unit vectors is off by less; candidates are scored again
BLOCK_ROWS = 4096
BLOCK_PAIRS = 4096  # scored exactly at once; 16 MiB an array
ASSIGN_SCORES = 1 << 22  # held at once while vectors are assigned; 32 MiB an array


class Members(NamedTuple):
    """Pictures with their vectors and what is needed to join them, sorted by id."""

    ids: np.ndarray  # int64 [N]
    vectors: np.ndarray  # float32 [N, D], the stored fp16 values
    home: np.ndarray  # int32 [N]
    probes: np.ndarray  # int32 [N, P], the lists that a picture looks into, its home the first; -1 where not known


def exact_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of row i of ``a`` and row i of ``b``, float32 [N]; the rows hold fp16 values.

    Each product of fp16 values is a multiple of 2**-48 and sums over unit vectors stay near 1: fp64 adds them exactly.
    """
    left, right = a.astype(np.float64), b.astype(np.float64)
    dot, left_square, right_square = (left * right).sum(1), (left * left).sum(1), (right * right).sum(1)
    length = np.sqrt(left_square) * np.sqrt(right_square)
    return np.asarray(dot / np.maximum(length, 1e-12), np.float32)


def similarities(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """``exact_similarity`` of rows ``i`` of ``a`` [N, D] and rows ``j`` of ``b`` [M, D], float32 [P], in blocks."""
    found = np.empty(len(i), np.float32)
    for start in range(0, len(i), BLOCK_PAIRS):
        block = slice(start, start + BLOCK_PAIRS)
        found[block] = exact_similarity(a[i[block]], b[j[block]])
    return found


def assign(vectors: np.ndarray, centroids: np.ndarray, num_probes: int) -> np.ndarray:
    """The lists that each vector probes, best first: its home and the next ones. Equal scores go by the lower number.

    Args:
        vectors: float [N, D], fp16 values.
        centroids: float [L, D], fp16 values.
        num_probes: lists to probe, cut to L.

    Returns:
        int32 [N, P].
    """
    num_probes = min(num_probes, len(centroids))
    wide = centroids.astype(np.float64).T
    probes = np.empty((len(vectors), num_probes), np.int32)
    rows = max(1, ASSIGN_SCORES // len(centroids))
    for start in range(0, len(vectors), rows):
        scores = -(vectors[start : start + rows].astype(np.float64) @ wide)
        if num_probes < len(centroids):  # the last that is let in, and all that equal it
            last = np.partition(scores, num_probes - 1, axis=1)[:, num_probes - 1]
            scores[scores > last[:, None]] = np.inf
        probes[start : start + rows] = np.argsort(scores, axis=1, kind="stable")[:, :num_probes]
    return probes


def looks_into(probes: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Whether each row of ``probes``, int32 [N, P], holds the number beside it in ``lists``, int32 [N]; bool [N]."""
    return np.asarray((probes == lists[:, None]).any(1))


def _candidates(left: np.ndarray, right: np.ndarray, floor: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(left), BLOCK_ROWS):
        for other in range(0, len(right), BLOCK_ROWS):
            scores = left[start : start + BLOCK_ROWS] @ right[other : other + BLOCK_ROWS].T
            i, j = np.nonzero(scores >= floor - GEMM_MARGIN)
            yield i + start, j + other


def join_list(members: Members, list_number: int, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges that one list answers for: between its pictures at home and all that probe it.

    A pair whose homes probe each other is met by two lists; the one with the lower number writes it.

    Returns:
        a, b (int64, a < b), similarity (float32), sorted by (a, b).
    """
    at_home = np.flatnonzero(members.home == list_number)
    visitors = np.flatnonzero((members.probes == list_number).any(1))
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for i, j in _candidates(members.vectors[at_home], members.vectors[visitors], floor):
        left, right = at_home[i], visitors[j]
        other_home = members.home[right]
        elsewhere = (other_home < list_number) & looks_into(members.probes[left], other_home)
        mine = np.where(other_home == list_number, members.ids[left] < members.ids[right], ~elsewhere)
        left, right = left[mine], right[mine]
        similarity = similarities(members.vectors, members.vectors, left, right)
        high = similarity >= np.float32(floor)
        a, b = members.ids[left[high]], members.ids[right[high]]
        found.append((np.minimum(a, b), np.maximum(a, b), similarity[high]))
    a, b, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((b, a))
    return a[order], b[order], similarity[order]


class Nearest(NamedTuple):
    """Pairs of a picture at home in a list and one of its nearest; by picture, the nearest first."""

    home: np.ndarray  # int64 [E], row of the picture in `members`
    other: np.ndarray  # int64 [E], row of the near one
    similarity: np.ndarray  # float32 [E]


def nearest_in_list(members: Members, others: Members, list_number: int, *, floor: float, num_nearest: int) -> Nearest:
    """For each picture at home in a list its nearest pictures among those that look into the list, itself left out.

    Args:
        members: pictures at home in the list, and others.
        others: pictures that may look into it, the same or other ones.
        list_number: of the list.
        floor: cosine that a near picture has at least.
        num_nearest: of each picture; of equally near ones those with the least ids.
    """
    at_home = np.flatnonzero(members.home == list_number)
    visitors = np.flatnonzero((others.probes == list_number).any(1))
    found = [Nearest(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for start in range(0, len(at_home), BLOCK_ROWS):
        homes = at_home[start : start + BLOCK_ROWS]
        best = found[0]
        for first in range(0, len(visitors), BLOCK_ROWS):
            near = visitors[first : first + BLOCK_ROWS]
            scores = members.vectors[homes] @ others.vectors[near].T
            i, j = np.nonzero(scores >= floor - GEMM_MARGIN)
            home, other = homes[i], near[j]
            apart = members.ids[home] != others.ids[other]
            more = Nearest(home[apart], other[apart], scores[i, j][apart])
            # Scores of the GEMM choose who is scored exactly: nobody who may be among the nearest is left out.
            best = _first_of_each(_joined(best, more), others.ids, num_nearest, margin=2 * GEMM_MARGIN)
        exact = similarities(members.vectors, others.vectors, best.home, best.other)
        high = exact >= np.float32(floor)
        best = Nearest(best.home[high], best.other[high], exact[high])
        found.append(_first_of_each(best, others.ids, num_nearest, margin=0.0))
    return _joined(*found)


def _joined(*parts: Nearest) -> Nearest:
    return Nearest(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _first_of_each(pairs: Nearest, ids: np.ndarray, num: int, *, margin: float) -> Nearest:
    """The first ``num`` of each picture, and all that are less similar than the last of them by at most ``margin``."""
    order = np.lexsort((ids[pairs.other], -pairs.similarity, pairs.home))
    home, similarity = pairs.home[order], pairs.similarity[order]
    starts = np.flatnonzero(np.diff(home, prepend=-1))
    group = np.cumsum(np.diff(home, prepend=-1) != 0) - 1
    rank = np.arange(len(home)) - starts[group]
    ends = np.append(starts[1:], len(home))
    last = similarity[np.minimum(starts + num, ends) - 1]
    kept = order[(rank < num) | ((similarity >= last[group] - margin) & (margin > 0))]
    return Nearest(pairs.home[kept], pairs.other[kept], pairs.similarity[kept])


def join_references(
    members: Members, references: Members, list_number: int, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges between the pool pictures at home in a list and the references that probe it.

    Returns:
        image_id, reference_id (int64), similarity (float32), sorted by (image_id, reference_id).
    """
    at_home = np.flatnonzero(members.home == list_number)
    visitors = np.flatnonzero((references.probes == list_number).any(1))
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for i, j in _candidates(members.vectors[at_home], references.vectors[visitors], floor):
        left, right = at_home[i], visitors[j]
        similarity = similarities(members.vectors, references.vectors, left, right)
        high = similarity >= np.float32(floor)
        found.append((members.ids[left[high]], references.ids[right[high]], similarity[high]))
    ids, reference_ids, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((reference_ids, ids))
    return ids[order], reference_ids[order], similarity[order]


def pairs_between(left: np.ndarray, right: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All rows of ``left`` and ``right`` that are near, without lists.

    Args:
        left: float32 [N, D], fp16 values.
        right: float32 [M, D], fp16 values.
        floor: cosine of a pair.

    Returns:
        Rows of ``left`` and of ``right`` (int64 [P]), similarity (float32 [P]).
    """
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for i, j in _candidates(left, right, floor):
        similarity = similarities(left, right, i, j)
        high = similarity >= np.float32(floor)
        found.append((i[high], j[high], similarity[high]))
    i, j, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    return i, j, similarity


def fit_centroids(vectors: np.ndarray, num_lists: int, seed: int) -> np.ndarray:
    """Spherical k-means by Faiss on one thread; float32 [at most num_lists, D], rounded to fp16 values."""
    import faiss

    faiss.omp_set_num_threads(1)
    num_lists = max(1, min(num_lists, len(vectors)))
    if len(vectors) == 0:
        return np.zeros((1, vectors.shape[1]), np.float32)
    kmeans = faiss.Kmeans(vectors.shape[1], num_lists, niter=20, seed=seed, spherical=True, min_points_per_centroid=1)
    kmeans.train(np.ascontiguousarray(vectors, np.float32))
    return np.asarray(kmeans.centroids, np.float16).astype(np.float32)
