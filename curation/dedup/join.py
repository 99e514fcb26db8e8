"""The join of copy descriptors: who is near whom, list by list, scored exactly.

A coarse quantiser cuts the vectors into lists. Each picture has a home list and probes its nearest ones. A list joins
the pictures at home in it with all that probe it: one GEMM per pair of blocks, in bf16 where there is much to multiply
and the processor has it, then each candidate is scored again from the stored fp16 vectors. That score is exact: fp64
holds products and sums of fp16 numbers below 1 without rounding, so no order of summation, block, precision of the GEMM
or machine can change it. Centroids are rounded to fp16 for the same reason: all tasks see the same home for a picture,
and each pair is written by one task.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from curation.represent.nearest import MARGINS, Device, Precision, multiplies_bf16, whole_sums

LENGTH_MARGIN = 1e-3  # by how much fp16 values of a unit vector may have another length, twice
BLOCK_ROWS, BLOCK_COLUMNS = 512, 1024  # scores of a GEMM; what it writes stays in the processor's cache
DEVICE_ROWS, DEVICE_COLUMNS = 8192, 16_384  # the same on a GPU; 400 MB with what compares them
ASSIGN_SCORES = 1 << 20  # held at once while vectors are assigned; 4 MiB
LEAST_BF16, LEAST_TO_IMPORT = 1 << 16, 1 << 21  # scores of a GEMM; torch takes seconds to import
MOST_RESCORED = 4  # times as many as are wanted; where bf16 leaves more, fp32 takes its place


class Members(NamedTuple):
    """Pictures with their vectors and what is needed to join them, sorted by id."""

    ids: np.ndarray  # int64 [N]
    vectors: np.ndarray  # float32 [N, D], the stored fp16 values
    home: np.ndarray  # int32 [N]
    probes: np.ndarray  # int32 [N, P], the lists that a picture looks into, its home the first; -1 where not known


def similarities(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Cosine of rows ``i`` of ``a`` [N, D] and rows ``j`` of ``b`` [M, D], float32 [P]; the rows hold fp16 values.

    Each product of fp16 values is a multiple of 2**-48 and sums over unit vectors stay near 1: fp64 adds them exactly.
    """
    from curation.dedup.joinloops import cosines

    found = np.empty(len(i), np.float32)
    cosines(a, b, i, j, found)
    return found


def precision_for(num_scores: int) -> Precision:
    """Of a GEMM of so many scores: bf16 where the processor multiplies by it and that pays. It changes no byte."""
    least = LEAST_BF16 if "torch" in sys.modules else LEAST_TO_IMPORT
    return "bf16" if num_scores >= least and multiplies_bf16() else "fp32"


def assign(vectors: np.ndarray, centroids: np.ndarray, num_probes: int) -> np.ndarray:
    """The lists that each vector probes, best first: its home and the next ones. Equal scores go by the lower number.

    Args:
        vectors: float32 [N, D], fp16 values of about unit length.
        centroids: float32 [L, D], the same.
        num_probes: lists to probe, cut to L.

    Returns:
        int32 [N, P].
    """
    from curation.dedup.joinloops import nearest_first

    num_lists, num_probes = len(centroids), min(num_probes, len(centroids))
    probes = np.empty((len(vectors), num_probes), np.int32)
    precision = precision_for(len(vectors) * num_lists)
    step = max(1, ASSIGN_SCORES // num_lists)
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step]
        scores = _scores(block, centroids, precision)
        last = np.partition(scores, num_lists - num_probes, axis=1)[:, num_lists - num_probes]
        floors = last - np.float32(2 * MARGINS[precision])
        num_scored = nearest_first(scores, floors, block, centroids, probes[start : start + step])
        if num_scored > MOST_RESCORED * len(block) * num_probes:
            precision = "fp32"
    return probes


def _scores(a: np.ndarray, b: np.ndarray, precision: Precision) -> np.ndarray:
    """Products of rows, float32 [N, M], off by less than the margin of the precision."""
    if precision == "fp32":
        return np.asarray(a @ b.T)
    import torch

    left, right = (torch.from_numpy(rows).bfloat16() for rows in (a, b))
    return np.asarray((left @ right.T).float().numpy())


def looks_into(probes: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Whether each row of ``probes``, int32 [N, P], holds the number beside it in ``lists``, int32 [N]; bool [N]."""
    return np.asarray((probes == lists[:, None]).any(1))


Candidates = Iterator[tuple[np.ndarray, np.ndarray]]  # rows of the left and of the right, int64 [P] each


def _candidates(left: np.ndarray, right: np.ndarray, floor: float, device: Device) -> Candidates:
    """Rows of ``left`` and of ``right`` whose cosine may reach the floor, block by block."""
    from curation.dedup.joinloops import at_least

    if device == "cuda":
        yield from torch_candidates(left, right, floor, device)
        return
    precision = precision_for(len(left) * len(right))
    lowest: Any = np.float32(floor - MARGINS[precision] - LENGTH_MARGIN)
    if precision == "bf16" and lowest > 0:
        # Bits of numbers above zero are ordered as the numbers are, and those of numbers below zero are below them.
        blocks, lowest = _bf16_blocks(left, right), np.int16(lowest.view(np.int32) >> 16)
    else:
        blocks = _fp32_blocks(left, right)
    for start, other, scores in blocks:
        i, j = at_least(scores, lowest)
        if len(i):
            yield i + start, j + other


def torch_candidates(left: np.ndarray, right: np.ndarray, floor: float, device: str) -> Candidates:
    """The same on a device of torch. Only rows come back from there, so nearly all the work is its GEMM."""
    import torch

    lowest = floor - MARGINS["bf16"] - LENGTH_MARGIN
    with whole_sums(), torch.inference_mode():
        all_columns = torch.from_numpy(right).to(device).bfloat16()
        for start in range(0, len(left), DEVICE_ROWS):
            rows = torch.from_numpy(left[start : start + DEVICE_ROWS]).to(device).bfloat16()
            for other in range(0, len(right), DEVICE_COLUMNS):
                scores = rows @ all_columns[other : other + DEVICE_COLUMNS].T
                i, j = (scores >= lowest).nonzero(as_tuple=True)
                yield i.cpu().numpy() + start, j.cpu().numpy() + other


Blocks = Iterator[tuple[int, int, np.ndarray]]  # first row of each, and scores, valid until the next


def _fp32_blocks(left: np.ndarray, right: np.ndarray) -> Blocks:
    """Scores as float32 [R, C]."""
    held = np.empty(BLOCK_ROWS * BLOCK_COLUMNS, np.float32)
    for start in range(0, len(left), BLOCK_ROWS):
        rows = left[start : start + BLOCK_ROWS]
        for other in range(0, len(right), BLOCK_COLUMNS):
            columns = right[other : other + BLOCK_COLUMNS].T
            scores = held[: len(rows) * columns.shape[1]].reshape(len(rows), -1)
            yield start, other, np.matmul(rows, columns, out=scores)


def _bf16_blocks(left: np.ndarray, right: np.ndarray) -> Blocks:
    """Scores as the bits of bf16, int16 [R, C]."""
    import torch

    all_rows, all_columns = (torch.from_numpy(vectors).bfloat16() for vectors in (left, right))
    held = torch.empty(BLOCK_ROWS * BLOCK_COLUMNS, dtype=torch.bfloat16)
    for start in range(0, len(left), BLOCK_ROWS):
        rows = all_rows[start : start + BLOCK_ROWS]
        for other in range(0, len(right), BLOCK_COLUMNS):
            columns = all_columns[other : other + BLOCK_COLUMNS].T
            scores = held[: len(rows) * columns.shape[1]].view(len(rows), -1)
            yield start, other, torch.mm(rows, columns, out=scores).view(torch.int16).numpy()


def _taken(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows, ascending, no copy where they are all there are."""
    return vectors if len(rows) == len(vectors) else vectors[rows]


def join_list(
    members: Members, list_number: int, floor: float, device: Device = "cpu"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges that one list answers for: between its pictures at home and all that probe it.

    A pair whose homes probe each other is met by two lists; the one with the lower number writes it. The device changes
    no byte.

    Returns:
        a, b (int64, a < b), similarity (float32), sorted by (a, b).
    """
    at_home = np.flatnonzero(members.home == list_number)
    visitors = np.flatnonzero((members.probes == list_number).any(1))
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for i, j in _candidates(members.vectors[at_home], _taken(members.vectors, visitors), floor, device):
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
    margin = float(MARGINS["fp32"] + LENGTH_MARGIN)
    found = [Nearest(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for start in range(0, len(at_home) * (num_nearest > 0), BLOCK_ROWS):
        homes = at_home[start : start + BLOCK_ROWS]
        least = np.full(len(homes), floor, np.float32)  # what the nearest of each have, as far as is known
        parts = [found[0]]
        for _, first, scores in _fp32_blocks(members.vectors[homes], _taken(others.vectors, visitors)):
            near = visitors[first : first + scores.shape[1]]
            if len(near) > num_nearest:
                kth = np.partition(scores, len(near) - num_nearest - 1, axis=1)[:, len(near) - num_nearest - 1]
                least = np.maximum(least, kth)  # itself may be one of them, so one more is taken
            i, j = np.nonzero(scores >= (least - np.float32(2 * margin))[:, None])
            home, other = homes[i], near[j]
            apart = members.ids[home] != others.ids[other]
            parts.append(Nearest(home[apart], other[apart], scores[i, j][apart]))
        # Scores of the GEMM choose who is scored exactly: nobody who may be among the nearest is left out.
        best = _first_of_each(_joined(*parts), others.ids, num_nearest, margin=2 * margin)
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
    members: Members, references: Members, list_number: int, floor: float, device: Device = "cpu"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges between the pool pictures at home in a list and the references that probe it.

    Returns:
        image_id, reference_id (int64), similarity (float32), sorted by (image_id, reference_id).
    """
    at_home = np.flatnonzero(members.home == list_number)
    visitors = np.flatnonzero((references.probes == list_number).any(1))
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for i, j in _candidates(members.vectors[at_home], _taken(references.vectors, visitors), floor, device):
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
    for i, j in _candidates(left, right, floor, "cpu"):
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
