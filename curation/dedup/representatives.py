"""Which picture stands for a group: most pixels, most bytes, least sha256, least id; and stars, which choose by it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from curation.dedup.near import rows_at
from curation.schema import ROWS_PER_SHARD_LIMIT
from curation.stage import TaskIO

NAME = "S64"  # a sha256 in hex: as bytes it takes a quarter of what numpy takes for text

# --- pure functions -------------------------------------------------------------------------------------------------


def representative_rank(ids: np.ndarray, pixels: np.ndarray, num_bytes: np.ndarray, sha256: np.ndarray) -> np.ndarray:
    """Rank of each picture as a representative, 0 the best: most pixels, most bytes, least sha256, least id.

    Args:
        ids: int64 [N].
        pixels: width times height, int64 [N].
        num_bytes: of the stored file, int64 [N].
        sha256: hex, str or bytes [N].
    """
    order = np.lexsort((ids, sha256, -num_bytes, -pixels))
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids))
    return rank


def representatives(group: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Position of the best-ranked member of each node's group, int64 [N].

    Args:
        group: number of the group of each node, whole numbers [N], within 0 to N - 1.
        rank: distinct ranks, int64 [N], within 0 to N - 1.
    """
    best = np.full(len(group), len(group), np.int64)
    np.minimum.at(best, group, rank)
    return np.asarray(np.argsort(rank, kind="stable")[best[group]])


class Election:
    """Representatives of groups whose members come one shard after the other; 84 bytes a group, none for a member."""

    def __init__(self, num_groups: int) -> None:
        words = np.dtype(NAME).itemsize // 8
        self._best = (
            np.full(num_groups, -1, np.int64),
            np.full(num_groups, -1, np.int64),
            np.zeros((num_groups, words), np.uint64),
        )
        self.node = np.zeros(num_groups, np.uint32)  # who stands for each group

    def add(
        self, group: np.ndarray, first: int, *, pixels: np.ndarray, num_bytes: np.ndarray, sha256: np.ndarray
    ) -> None:
        """Let consecutive nodes stand; of equals the one that came first wins, so nodes come in the order of ids.

        Args:
            group: of each node, uint32 [N].
            first: number of the first node.
            pixels: width times height, int64 [N].
            num_bytes: of the stored file, int64 [N].
            sha256: hex, bytes [N].
        """
        from curation.dedup.unionloops import elect

        names = np.ascontiguousarray(sha256, NAME).view(">u8").astype(np.uint64).reshape(len(group), -1)
        elect(group, first, (pixels, num_bytes, names), self._best, self.node)


class Stars:
    """Neighbours of each node, from edges that come in chunks, twice: to count and to list. 8 bytes an edge."""

    def __init__(self, num_nodes: int) -> None:
        self._start = np.zeros(num_nodes + 1, np.int64)
        self._neighbour = np.empty(0, np.uint32)

    def count(self, a: np.ndarray, b: np.ndarray) -> None:
        """First time: both ends of a chunk of edges, uint32 [E] each."""
        from curation.dedup.unionloops import count_ends

        count_ends(self._start, a, b)

    def list(self, a: np.ndarray, b: np.ndarray) -> None:
        """Second time, once all are counted."""
        from curation.dedup.unionloops import list_neighbours

        if len(self._neighbour) == 0:
            np.cumsum(self._start, out=self._start)
            self._neighbour = np.empty(self._start[-1], np.uint32)
        list_neighbours(self._start, self._neighbour, a, b)

    def centres(self, rank: np.ndarray) -> np.ndarray:
        """Centre of each node, uint32 [N]; see ``stars``."""
        from curation.dedup.unionloops import take_stars

        centre = np.full(len(rank), len(rank), np.uint32)
        take_stars(np.argsort(rank, kind="stable"), self._start, self._neighbour, centre)
        return centre


def stars(rank: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Centre of each node: greedy in the order of ranks, a free node becomes a centre and takes its free neighbours.

    Args:
        rank: distinct ranks, int64 [N], within 0 to N - 1.
        a: one end of each edge, whole numbers [E].
        b: the other end.

    Returns:
        Node number of the centre, int64 [N]; itself for a centre.
    """
    a, b = (np.ascontiguousarray(end, np.uint32) for end in (a, b))
    found = Stars(len(rank))
    found.count(a, b)
    found.list(a, b)
    return found.centres(rank).astype(np.int64)


# --- reading --------------------------------------------------------------------------------------------------------


def picture_sizes(io: TaskIO, shard: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (int64), num_bytes (int64) and sha256 (hex, 64 bytes) of pictures of one shard; ids ascending."""
    hashes = io.read(io.part("hashes", shard), ["image_id", "sha256", "width_px", "height_px"])
    at = pa.array(rows_at(hashes["image_id"].to_numpy(), ids))
    width, height = (hashes[name].take(at).fill_null(0).to_numpy() for name in ("width_px", "height_px"))
    sha256 = np.array(hashes["sha256"].take(at).to_pylist(), NAME)
    images = io.read(io.part("images", shard), ["image_id", "num_bytes"])
    at = pa.array(rows_at(images["image_id"].to_numpy(), ids))
    num_bytes = images["num_bytes"].take(at).fill_null(0).to_numpy().astype(np.int64)
    return width.astype(np.int64) * height.astype(np.int64), num_bytes, sha256


def ranks_of(io: TaskIO, ids: np.ndarray, shards: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Representative ranks (int64) and sha256 (hex, 64 bytes) of pictures of many shards, read one shard at a time.

    About 130 bytes a picture: 80 for what is compared, and the rest while it is sorted.

    Args:
        io: of the task.
        ids: int64 [N], ascending.
        shards: that hold them, ascending.
    """
    pixels, num_bytes, sha256 = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64), np.empty(len(ids), NAME)
    for shard in shards:
        start, end = np.searchsorted(ids, (shard * ROWS_PER_SHARD_LIMIT, (shard + 1) * ROWS_PER_SHARD_LIMIT))
        if start < end:
            pixels[start:end], num_bytes[start:end], sha256[start:end] = picture_sizes(io, shard, ids[start:end])
    return representative_rank(ids, pixels, num_bytes, sha256), sha256
