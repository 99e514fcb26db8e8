"""Which pictures of a cluster are too like one that comes before them: the rule of SemDeDup, exact.

Abbas et al. 2023 (arXiv:2303.09540, section 3): the pictures of a cluster are put in an order, and each goes that is
too like any before it, whether that one stays or goes. So of a chain A ~ B ~ C, A stays, and B and C go.

A GEMM proposes pairs and the exact cosine of the stored fp16 values decides, so that neither blocks, their order, nor
the processor changes a byte.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from curation.represent.nearest import MARGINS, widened

WhichToKeep = Literal["hard", "easy", "random"]

_ROWS, _COLUMNS = 512, 4096  # scores that are held at once: 8 MiB


def in_order(
    which: WhichToKeep, *, cluster: np.ndarray, similarity: np.ndarray, tie: np.ndarray, image_id: np.ndarray
) -> np.ndarray:
    """Places of pictures by cluster, and in each cluster those that stay before those that go for them, int64 [N].

    Args:
        which: hard: the farthest from the centroid first; easy: the nearest first; random: by ``tie``.
        cluster: int32 [N].
        similarity: to the centroid, float32 [N].
        tie: what decides between equals, uint64 [N]; then the id does.
        image_id: int64 [N].
    """
    key = {"hard": similarity, "easy": -similarity, "random": np.zeros(len(similarity), np.float32)}[which]
    return np.lexsort((image_id, tie, key, cluster))


class Ranked(NamedTuple):
    """Pictures of one cluster, or some of them, in their order."""

    rank: np.ndarray  # int64 [N], ascending
    vectors: np.ndarray  # float32 [N, D], fp16 values
    length: np.ndarray  # float64 [N], of the vectors


def ranked(rank: np.ndarray, vectors: np.ndarray) -> Ranked:
    """Pictures with what is needed to compare them.

    Args:
        rank: place in the order of the cluster, int64 [N], ascending.
        vectors: fp16 values, [N, D].
    """
    from curation.represent import loops

    held = widened(vectors)
    return Ranked(rank, held, np.sqrt(loops.squares(held)))


class Before:
    """Of each picture the most similar one that comes before it, where that is too like it."""

    def __init__(self, num: int, eps: float) -> None:
        self.similarity = np.full(num, 1 - eps, np.float32)  # by rank; what is not above it is not found
        self.rank = np.full(num, -1, np.int64)  # of the other; ties go to the first; -1: there is none

    def find(self, left: Ranked, right: Ranked) -> None:
        """Hold the pictures of ``left`` against those of ``right`` that come before them, in blocks."""
        from curation.represent import loops

        margin = max(MARGINS["fp32"], 1.1 * left.vectors.shape[1] * 2.0**-24)
        for start in range(0, len(left.rank), _ROWS):
            rows = slice(start, start + _ROWS)
            block, rank, length = left.vectors[rows], left.rank[rows], left.length[rows]
            end = int(np.searchsorted(right.rank, rank[-1]))
            for other in range(0, end, _COLUMNS):
                columns = slice(other, min(other + _COLUMNS, end))
                loops.find_before(
                    block @ right.vectors[columns].T,
                    (block, length, rank),
                    (right.vectors[columns], right.length[columns], right.rank[columns]),
                    margin,
                    (self.similarity, self.rank),
                )

    def kept(self) -> np.ndarray:
        """Rank of the picture that stays for each, itself where it does, int64 [N]: where the chain of ranks ends."""
        last = np.where(self.rank < 0, np.arange(len(self.rank)), self.rank)
        while not np.array_equal(last, further := last[last]):
            last = further
        return last
