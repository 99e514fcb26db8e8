"""The nearest pool pictures of queries, list by list, scored exactly.

The clusters of the pool are its lists. A query looks into the lists of its nearest centroids. Each list is one GEMM of
its pictures with all queries that look into it; what may be among the ``k`` nearest, by a margin that the rounding of
the GEMM cannot reach, is scored again from the stored fp16 vectors, exactly. So no block, no order and no device
changes what is found, and a search of all lists is exact. Faiss scans a list for one query at a time; many queries that
share a list make it a GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from curation.represent import kmeans
from curation.represent.nearest import MARGINS

FEW_LISTS = 64  # so few are all looked into
MARGIN = MARGINS["fp32"]
_BLOCK_SCORES = 1 << 24  # similarities held at once; 64 MiB
_BLOCK_ROWS = 1 << 12  # queries of one GEMM, in fp32: 20 MB at D = 1280
_BLOCK_MEMBERS = 1 << 14  # pool pictures of one GEMM, in fp32: 80 MB at D = 1280
_NOTHING = np.float32(-2.0)  # below any cosine


class Pairs(NamedTuple):
    """Scored pairs of a query and a pool picture."""

    query: np.ndarray  # int64 [P], place among the queries
    pool: np.ndarray  # int64 [P], place in the pool
    similarity: np.ndarray  # float32 [P], exact


class Scorer(Protocol):
    """Scores of queries against pool pictures, on one device."""

    def above(
        self, rows: np.ndarray, members: slice, floor: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of some queries and a run of pool pictures whose score reaches the floor of their query.

        Args:
            rows: places of queries, int64 [R].
            members: places in the pool.
            floor: of each of these queries, float32 [R]; where it is below any cosine, the ``k``-th best score of the
                run, less the margin, takes its place.
            k: neighbours wanted.

        Returns:
            row, int64 [P], counted within ``rows``; member, int64 [P], counted within the run; score, float32 [P].
        """


class NumpyScorer:
    """On the CPU."""

    def __init__(self, queries: np.ndarray, pool: np.ndarray) -> None:
        self._queries = queries.astype(np.float32)  # [Q, D]; they are taken often, and NumPy is slow at it
        self._pool = pool  # float16 [N, D]

    def above(  # noqa: D102
        self, rows: np.ndarray, members: slice, floor: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores = self._queries[rows] @ self._pool[members].astype(np.float32).T  # [R, M]
        place = scores.shape[1] - k
        unknown = np.flatnonzero(floor <= _NOTHING)
        if len(unknown) and place > 0:
            floor = floor.copy()
            floor[unknown] = np.partition(scores[unknown], place, axis=1)[:, place] - 2 * MARGIN
        at = np.flatnonzero(scores >= floor[:, None])  # a tenth of the time of nonzero
        row, member = np.divmod(at, scores.shape[1])
        return row, member, scores.ravel()[at]


class TorchScorer:
    """On a GPU: the vectors are copied there once."""

    def __init__(self, queries: np.ndarray, pool: np.ndarray, device: str) -> None:
        import torch

        self._torch: Any = torch
        self._device = device
        self._queries = torch.from_numpy(np.ascontiguousarray(queries)).to(device)  # half [Q, D]
        self._pool = torch.from_numpy(np.ascontiguousarray(pool)).to(device)  # half [N, D]

    def above(  # noqa: D102
        self, rows: np.ndarray, members: slice, floor: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = self._torch.from_numpy(rows).to(self._device)
        scores = self._queries[at].float() @ self._pool[members].float().T  # [R, M]
        lowest = self._torch.from_numpy(floor).to(self._device)
        if scores.shape[1] > k and bool((floor <= _NOTHING).any()):
            kth = scores.topk(k, dim=1).values[:, -1] - 2 * MARGIN
            lowest = self._torch.where(lowest <= float(_NOTHING), kth, lowest)
        row, member = (scores >= lowest[:, None]).nonzero(as_tuple=True)
        return row.cpu().numpy(), member.cpu().numpy(), scores[row, member].cpu().numpy()


def scorer_on(device: str, queries: np.ndarray, pool: np.ndarray) -> Scorer:
    """A scorer for queries, float16 [Q, D], and pool pictures, float16 [N, D]."""
    return NumpyScorer(queries, pool) if device == "cpu" else TorchScorer(queries, pool, device)


def rank_in(groups: np.ndarray) -> np.ndarray:
    """Place of each row within its group, from 0, where rows of a group stand together."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else np.zeros(0, np.int64)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))


class _Search:
    """What may be among the ``k`` nearest of each query, of all that was looked at so far."""

    def __init__(self, queries: np.ndarray, pool: np.ndarray, *, k: int, device: str) -> None:
        self._queries, self._pool, self._k = queries, pool, k
        self._scorer = scorer_on(device, queries, pool)
        self._best = np.full((len(queries), k), _NOTHING, np.float32)  # scores: what cannot beat the last is left out
        self._found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]

    def look(self, queries: np.ndarray, first: int, end: int) -> None:
        """Hold some queries, int64 [R], against a run of the pool that they have not met."""
        for start in range(first, end, _BLOCK_MEMBERS):
            stop = min(start + _BLOCK_MEMBERS, end)
            step = min(_BLOCK_ROWS, max(1, _BLOCK_SCORES // (stop - start)))
            for at in range(0, len(queries), step):
                rows = queries[at : at + step]
                row, member, score = self._scorer.above(rows, slice(start, stop), self._floors(rows), self._k)
                if len(row):
                    self._found.append((rows[row], member + start, score))
                    self._take(rows[row], score)

    def found(self) -> Pairs:
        """What the last floors leave, scored exactly."""
        query, member, score = (np.concatenate(column) for column in zip(*self._found, strict=True))
        near = score >= self._floors(query)
        query, member = query[near], member[near]
        return Pairs(query, member, kmeans.similarities(self._queries, self._pool, query, member))

    def _floors(self, rows: np.ndarray) -> np.ndarray:
        """Scores that a pair of these queries needs, float32 [R]; ``_NOTHING`` where fewer than ``k`` were seen."""
        floor = self._best[rows].min(axis=1)
        return np.where(floor > _NOTHING, floor - np.float32(2 * MARGIN), _NOTHING)

    def _take(self, query: np.ndarray, score: np.ndarray) -> None:
        """Take note of the scores of new pairs."""
        order = np.lexsort((-score, query))
        rank = rank_in(query[order])
        order, rank = order[rank < self._k], rank[rank < self._k]
        rows, place = np.unique(query[order], return_inverse=True)
        new = np.full((len(rows), self._k), _NOTHING, np.float32)
        new[place, rank] = score[order]
        both = np.concatenate([self._best[rows], new], axis=1)  # [R, 2k]
        self._best[rows] = np.partition(both, self._k, axis=1)[:, self._k :]


def _visits(probes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each list that is looked into, with the queries that do, int64 [R]: first the nearest list of each query."""
    for columns in (probes[:, :1], probes[:, 1:]):
        flat = columns.ravel()
        order = np.argsort(flat, kind="stable")
        lists, starts = np.unique(flat[order], return_index=True)
        queries = np.split(order // max(1, columns.shape[1]), starts[1:])
        yield from zip(lists.tolist(), queries[: len(lists)], strict=True)


def search_lists(
    queries: np.ndarray, pool: np.ndarray, *, cluster: np.ndarray, probes: np.ndarray, k: int, device: str = "cpu"
) -> Pairs:
    """All pairs that may be among the ``k`` nearest that the lists of a query hold, ties of the last one too.

    Args:
        queries: float16 [Q, D], unit length.
        pool: float16 [N, D], the same, pictures of a list together.
        cluster: list of each pool picture, int32 [N], ascending.
        probes: lists that each query looks into, int32 [Q, P], the nearest first.
        k: neighbours wanted.
        device: cpu or cuda.
    """
    search = _Search(queries, pool, k=k, device=device)
    ends = np.searchsorted(cluster, np.arange(int(probes.max(initial=-1)) + 2, dtype=cluster.dtype))
    for number, visitors in _visits(probes):
        search.look(visitors, int(ends[number]), int(ends[number + 1]))
    return search.found()


def search_all(queries: np.ndarray, pool: np.ndarray, *, k: int, device: str = "cpu") -> Pairs:
    """All pairs that may be among the ``k`` nearest of the whole pool, ties of the last one too.

    Args:
        queries: float16 [Q, D], unit length.
        pool: float16 [N, D], the same.
        k: neighbours wanted.
        device: cpu or cuda.
    """
    search = _Search(queries, pool, k=k, device=device)
    search.look(np.arange(len(queries)), 0, len(pool))
    return search.found()


def nearest_lists(vectors: np.ndarray, centroids: np.ndarray, num: int) -> np.ndarray:
    """The lists that each query looks into: those of its nearest centroids, ties by number.

    Args:
        vectors: float16 [Q, D], unit length.
        centroids: float16 [K, D].
        num: at most K are given.

    Returns:
        int32 [Q, min(num, K)]: the nearest first, the others by number.
    """
    num, lists = min(num, len(centroids)), centroids.astype(np.float32)
    found = np.zeros((len(vectors), num), np.int32)
    step = min(_BLOCK_ROWS, max(1, _BLOCK_SCORES // len(centroids)))
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step]
        scores = block.astype(np.float32) @ lists.T  # [R, K]
        home = _highest(scores, block, centroids, 1)
        others = _highest(scores, block, centroids, num) & ~home
        found[start : start + step, 0] = home.argmax(axis=1)
        found[start : start + step, 1:] = np.nonzero(others)[1].reshape(len(block), num - 1)
    return found


def _highest(scores: np.ndarray, a: np.ndarray, b: np.ndarray, num: int) -> np.ndarray:
    """The ``num`` nearest rows of ``b`` of each row of ``a``, bool [R, K]; only scores near the last decide exactly."""
    place = scores.shape[1] - num
    last = np.partition(scores, place, axis=1)[:, place : place + 1]
    chosen = scores > last + 2 * MARGIN
    row, column = np.nonzero(~chosen & (scores >= last - 2 * MARGIN))
    exact = kmeans.similarities(a, b, row, column)
    order = np.lexsort((column, -exact, row))
    missing = num - chosen.sum(axis=1)
    order = order[rank_in(row[order]) < missing[row[order]]]
    chosen[row[order], column[order]] = True
    return np.asarray(chosen)
