"""Connected components of edges that come chunk by chunk, and the numbers that pictures bear meanwhile.

Edges are never held: a component is told by one number of four bytes a node. The least node of a component is its name,
so the result depends on the set of edges only, never on their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from curation.schema import ROWS_PER_SHARD_LIMIT

MOST_NODES = 2**32 - 1
_WORD = 64  # bits


class UnionFind:
    """Components of nodes 0 to ``num_nodes - 1``; 4 bytes a node, and nothing for an edge."""

    def __init__(self, num_nodes: int) -> None:
        if num_nodes > MOST_NODES:
            raise ValueError(f"{num_nodes:,} nodes, allowed: {MOST_NODES:,} and fewer")
        self.parent = np.arange(num_nodes, dtype=np.uint32)

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join both ends of each edge of a chunk; self edges and repeated ones are allowed.

        Args:
            a: one end, whole numbers [E].
            b: the other end.

        Raises:
            IndexError: an end is no node.
        """
        from curation.dedup.unionloops import join

        join(self.parent, *self._nodes(a, b))

    def add_apart(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """As ``add``; which edges joined what was apart before, bool [E]."""
        from curation.dedup.unionloops import join_apart

        joined = np.empty(len(a), bool)
        join_apart(self.parent, *self._nodes(a, b), joined)
        return joined

    def labels(self) -> np.ndarray:
        """Least node of the component of each node, uint32 [N]; it is the array of the object, no copy."""
        from curation.dedup.unionloops import flatten

        flatten(self.parent)
        return self.parent

    def _nodes(self, *ends: np.ndarray) -> Iterator[np.ndarray]:
        for end in ends:
            if len(end) and not (end.min() >= 0 and end.max() < len(self.parent)):
                raise IndexError(
                    f"an edge ends at node {end.min() if end.min() < 0 else end.max()}, "
                    f"allowed: 0 to {len(self.parent) - 1}"
                )
            yield np.ascontiguousarray(end, np.uint32)


def connected_components(num_nodes: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Component of each node, int64 [num_nodes]: the least node of it.

    Args:
        num_nodes: nodes are 0 to ``num_nodes - 1``.
        a: one end of each edge, whole numbers [E]; self edges and repeated ones are allowed.
        b: the other end.
    """
    found = UnionFind(num_nodes)
    found.add(a, b)
    return found.labels().astype(np.int64)


class Numbers:
    """Pictures that were seen, numbered from 0 in the order of their ids.

    One bit and a sixteenth of a byte for each row of the shards, whether it was seen or not: 0.25 GB for 1.3 billion.
    Sorted ids would take 8 bytes for each picture that was seen, and twice that while they are gathered.
    """

    def __init__(self, shards: Sequence[int], shard_rows: int) -> None:
        """``shards`` ascending; none holds more than ``shard_rows`` rows."""
        self.shards = np.asarray(shards, np.int64)
        self._rows = -(-shard_rows // _WORD) * _WORD  # a shard begins at a word
        # Runs of consecutive shards are few, one a source.
        self._run = np.flatnonzero(np.diff(self.shards, prepend=-2) != 1)
        self._bits = np.zeros(len(self.shards) * self._rows // _WORD, np.uint64)
        self._before = np.zeros(len(self._bits) + 1, np.uint32)

    def __len__(self) -> int:
        return int(self._before[-1])

    def see(self, ids: np.ndarray) -> None:
        """Note pictures, int64 [E], in any order and as often as they come; ``close`` follows the last."""
        word, bit = self._at(ids)
        np.bitwise_or.at(self._bits, word, np.uint64(1) << bit)

    def close(self) -> None:
        """All were seen: number them.

        Raises:
            ValueError: more than 2**32 - 1.
        """
        total = 0
        for start in range(0, len(self._bits), 1 << 20):
            counts = np.cumsum(np.bitwise_count(self._bits[start : start + (1 << 20)]), dtype=np.int64) + total
            total = int(counts[-1])
            if total > MOST_NODES:
                raise ValueError(f"more than {MOST_NODES:,} pictures are in an edge, which is the most there may be")
            self._before[start + 1 : start + 1 + len(counts)] = counts

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Numbers of pictures that were seen, uint32 [E]."""
        word, bit = self._at(ids)
        below = np.bitwise_count(self._bits[word] & ((np.uint64(1) << bit) - np.uint64(1)))
        return np.asarray(self._before[word] + below)

    def of_shard(self, place: int) -> tuple[int, np.ndarray]:
        """Number of the first picture of ``shards[place]``, and ids of all that were seen of it, int64, ascending."""
        first, end = place * self._rows // _WORD, (place + 1) * self._rows // _WORD
        rows = np.flatnonzero(np.unpackbits(self._bits[first:end].astype("<u8").view(np.uint8), bitorder="little"))
        return int(self._before[first]), rows + self.shards[place] * ROWS_PER_SHARD_LIMIT

    def ids(self) -> np.ndarray:
        """Ids of all that were seen, int64 [N], ascending."""
        ids = np.empty(len(self), np.int64)
        for place in range(len(self.shards)):
            first, mine = self.of_shard(place)
            ids[first : first + len(mine)] = mine
        return ids

    def _at(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Word and bit of each picture, int64 and uint64.

        Raises:
            LookupError: a picture lies in none of the shards.
        """
        if len(ids) == 0:
            return np.empty(0, np.int64), np.empty(0, np.uint64)
        shard, row = np.divmod(ids, ROWS_PER_SHARD_LIMIT)
        run = self._run[np.searchsorted(self.shards[self._run], shard, side="right") - 1]
        place = np.minimum(run + shard - self.shards[run], len(self.shards) - 1)
        stray = (self.shards[place] != shard) | (row >= self._rows)
        if stray.any():
            raise LookupError(f"picture {ids[np.argmax(stray)]} is in an edge and lies in no shard of the pool")
        at = place * self._rows + row
        return at // _WORD, (at % _WORD).astype(np.uint64)
