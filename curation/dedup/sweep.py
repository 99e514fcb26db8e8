"""What each threshold would make of the stored edges: components from the highest similarity down, in one go.

Edges are sorted into steps of similarity. Of what was read so far only a spanning forest is kept, made from the highest
step down, as Kruskal makes it: at each threshold it joins what all edges join, and it has fewer edges than there are
pictures. In the end the forest is gone through once more, step by step, and components are counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from curation.dedup.unionfind import UnionFind
from curation.schema import TABLES

_PENDING = 1 << 22  # edges gathered before the forest is made again


class _Edges(NamedTuple):
    a: np.ndarray  # uint32 [E]
    b: np.ndarray  # uint32 [E]
    step: np.ndarray  # uint8 [E], position of the highest threshold that the edge reaches


_NONE = _Edges(np.empty(0, np.uint32), np.empty(0, np.uint32), np.empty(0, np.uint8))


def grid(floor: float, in_use: float) -> list[float]:
    """Thresholds to be told of: the floor of the stored edges, the hundredths above it up to 1, and the one in use."""
    hundredths = (n / 100 for n in range(-100, 101) if n / 100 > floor)
    return sorted({round(floor, 6), *hundredths, round(in_use, 6)})


class Sweep:
    """Components at each of some thresholds.

    Of each picture 17 bytes are held: 9 for its edge of the forest and 8 while components are counted. Edges that come
    in take 17 bytes each until they are as many as those of the forest, and 4 million at least.
    """

    def __init__(self, num_nodes: int, thresholds: list[float]) -> None:
        """At most 256 thresholds, ascending."""
        self._num_nodes = num_nodes
        self._values = np.asarray(thresholds, np.float32)
        self._num_edges = np.zeros(len(thresholds), np.int64)
        self._forest = _NONE
        self._pending = [_NONE]
        self._num_pending = 0

    def add(self, a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> None:
        """A chunk of edges between different nodes: uint32 [E], uint32 [E], float32 [E]."""
        step = np.searchsorted(self._values, similarity, side="right") - 1
        high = step >= 0
        edges = _Edges(a[high], b[high], step[high].astype(np.uint8))
        self._num_edges += np.bincount(edges.step, minlength=len(self._values))
        self._pending.append(edges)
        self._num_pending += len(edges.a)
        if self._num_pending > max(_PENDING, len(self._forest.a)):
            self._thin()

    def table(self, in_use: float) -> pa.Table:
        """The table ``component_sweep``."""
        from curation.dedup.unionloops import grow

        self._thin()
        parent, size = np.arange(self._num_nodes, dtype=np.uint32), np.ones(self._num_nodes, np.uint32)
        told = np.zeros(3, np.int64)
        counts = np.zeros((3, len(self._values)), np.int64)
        for step in reversed(range(len(self._values))):
            at = self._forest.step == step
            grow(parent, size, self._forest.a[at], self._forest.b[at], told)
            counts[:, step] = told
        num_components, num_pictures, largest = counts
        columns = [
            self._values,
            self._values == np.float32(in_use),
            np.cumsum(self._num_edges[::-1])[::-1],
            num_components,
            num_pictures,
            num_pictures - num_components,
            largest,
        ]
        return pa.table([pa.array(column) for column in columns], schema=TABLES["component_sweep"].schema)

    def _thin(self) -> None:
        """Keep of all edges a forest that joins the same, at every threshold."""
        edges = _Edges(*(np.concatenate(parts) for parts in zip(self._forest, *self._pending, strict=True)))
        self._forest, self._pending, self._num_pending = _NONE, [_NONE], 0
        found = UnionFind(self._num_nodes)
        keep = np.zeros(len(edges.a), bool)
        for step in reversed(range(len(self._values))):
            at = np.flatnonzero(edges.step == step)
            keep[at] = found.add_apart(edges.a[at], edges.b[at])
        self._forest = _Edges(*(column[keep] for column in edges))
